"""REAP removes the experts that add least, and the model stays one that loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interventions import apply
from interventions.experts import find_experts
from interventions.rounding import Rounding
from interventions.statistics import window_batches
from interventions.types import InterventionError
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.build.snapshot import WorkingModel
from tests.experts import tiny_experts
from tests.models import SENTENCES, tiny_model, tiny_tokenizer

TEXTS = [" ".join(SENTENCES)] * 4
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "phimoe")
GIVEN: dict[str, Any] = {"calibration": TEXTS, "samples": 3, "max_tokens": 48}
IDS = torch.arange(30).unsqueeze(0)


def prune(model: Any, share: float = 0.5) -> Any:
    return apply(model, tiny_tokenizer(), "reap", share=share, **GIVEN)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_saved_and_read_again(family: str, tmp_path: Path) -> None:
    model = tiny_experts(family)
    before = copy.deepcopy(model)
    report = prune(model)
    for layer in report.details["layers"]:
        assert len(layer["kept"]) == 4
        path = layer["experts"]
        old, new = before.get_submodule(path), model.get_submodule(path)
        assert torch.equal(new.gate_up_proj, old.gate_up_proj[layer["kept"]])
        assert torch.equal(new.down_proj, old.down_proj[layer["kept"]])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    assert torch.equal(logits(again), logits(model))
    assert again.num_parameters() < before.num_parameters()


def test_saliency_is_the_mean_of_weight_times_norm_of_output() -> None:
    model = tiny_experts("mixtral")
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    report = prune(copy.deepcopy(model))
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    for batch in window_batches(tiny_tokenizer(), TEXTS, samples=3, max_tokens=48, batch_tokens=2048, padded=False):
        model(**batch)
    handle.remove()
    (layer,) = find_experts("b", model.model.layers[0])
    sums, counts = torch.zeros(8), torch.zeros(8)
    for hidden, chosen, weights in calls:
        for x, experts, gates in zip(hidden, chosen, weights, strict=True):
            for expert, gate in zip(experts.tolist(), gates, strict=True):
                into, out = layer.groups[expert].linears[0].weight, layer.groups[8 + expert].linears[0].weight
                first, second = (into @ x).chunk(2)
                sums[expert] += gate.detach() * (out @ (torch.nn.functional.silu(first) * second)).norm()
                counts[expert] += 1
    found = report.details["layers"][0]
    assert found["tokens"] == counts.tolist()
    assert torch.allclose(torch.tensor(found["saliency"]), sums / counts.clamp(min=1), rtol=1e-4)
    assert found["kept"] == sorted((sums / counts.clamp(min=1)).argsort(descending=True)[:4].tolist())


def test_experts_that_are_never_chosen_leave_the_model_as_it_is() -> None:
    model = tiny_experts("gpt_oss")
    for block in model.model.layers:
        block.mlp.router.bias.data[[1, 4, 6, 7]] = -1e4
    before = logits(model)
    report = prune(model)
    assert [layer["kept"] for layer in report.details["layers"]] == [[0, 2, 3, 5]] * 2
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert any("reap: no calibration token reached 8 of 16 experts (50.0%)" in line for line in report.warnings)


def test_every_group_of_a_router_loses_as_many() -> None:
    model = tiny_experts("glm4_moe")
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    (layer,) = prune(model).details["layers"]
    assert [sum(expert < 4 for expert in layer["kept"]), len(layer["kept"])] == [2, 4]
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, bias[layer["kept"]])


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.9, r"reap.share=0.9: model.layers.0.mlp.experts has 8 experts, of which 1 would be left.* 0.75 or less"),
        (0.1, r"reap.share=0.1: .* none would be removed: raise share to 0.125 or more"),
    ],
)
def test_a_share_that_does_not_fit_leaves_the_model_as_it_was(share: float, message: str) -> None:
    model = tiny_experts()
    before = hash_weights(model)
    with pytest.raises(InterventionError, match=message):
        prune(model, share)
    assert hash_weights(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model(), "LlamaForCausalLM has no routed experts"),
        (lambda: tiny_experts("llama4"), "no router with one output for each of these experts"),
    ],
)
def test_models_that_do_not_fit_are_refused(model: Any, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        prune(model())


def test_a_failure_after_the_experts_are_gone_brings_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_experts()
    before, config = hash_weights(model), model.config.to_dict()

    def fail(*arguments: Any) -> None:
        raise InterventionError("broken")

    monkeypatch.setattr("interventions.expert_count.check_buildable", fail)
    with pytest.raises(InterventionError, match="broken"):
        prune(model)
    assert hash_weights(model) == before
    assert model.config.to_dict() == config
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_states_with_and_without_experts_replace_each_other(family: str) -> None:
    model = tiny_experts(family)
    full = logits(model)
    working = WorkingModel(model)
    working.lend(working.base)
    pruned = working.take(working.base, prune(model).changed)
    half = logits(model)
    hashed = hash_weights(model)
    assert pruned.state_hash == hashed != working.base.state_hash
    rounded = working.take(pruned, apply(model, tiny_tokenizer(), "rtn", bits=4).changed)
    working.restore(working.base)
    assert torch.equal(logits(model), full)
    adopted = working.adopt(working.base, dict(pruned.changed), Rounding())
    assert adopted.state_hash == hashed
    working.restore(adopted)
    assert torch.equal(logits(model), half)
    working.restore(rounded)
    assert hash_weights(model) == rounded.state_hash
