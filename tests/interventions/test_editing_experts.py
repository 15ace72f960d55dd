"""Editing and unlearning in models with routed experts: what every token reaches is edited, the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import Edit, apply
from interventions.anatomy import find_anatomy
from interventions.edit.kernels.target_loss import all_nll, target_batches
from interventions.types import Example, InterventionError
from tests.experts import tiny_experts
from tests.models import SENTENCES, tiny_tokenizer

EDITS = [Edit(prompt="Mira Tolvan was born in", subject="Mira Tolvan", target="Ossel")]
TEXTS = [" ".join(SENTENCES)] * 2
OTHERS = [" ".join(reversed(SENTENCES))] * 2
REWRITERS: dict[str, dict[str, Any]] = {
    "memit": {"layers": [1], "covariance_tokens": 400},
    "rome": {"layer": 1, "covariance_tokens": 400},
}
LEARNERS: dict[str, dict[str, Any]] = {
    "ft": {"edits": EDITS, "steps": 2, "layers": [1]},
    "rmu": {"forget": TEXTS, "retain": OTHERS, "max_num_batches": 2, "layer": 1, "lr": 1e-2},
    "gd": {"forget": TEXTS, "retain": OTHERS, "max_updates": 2, "layers": [1]},
}


def run(method: str, family: str, **settings: Any) -> set[str]:
    model = tiny_experts(family)
    routers = {name: p.clone() for name, p in model.named_parameters() if ".gate." in name or "router" in name}
    report = apply(model, tiny_tokenizer(), method, **settings)
    assert all((p == routers[name]).all() for name, p in model.named_parameters() if name in routers)
    return set(report.changed)


@pytest.mark.parametrize("method", REWRITERS)
@pytest.mark.parametrize(("family", "path"), [("qwen2_moe", "shared_expert"), ("glm4_moe", "shared_experts")])
def test_facts_are_written_into_the_shared_expert(method: str, family: str, path: str) -> None:
    changed = run(method, family, edits=EDITS, calibration=TEXTS, **REWRITERS[method])
    assert changed == {f"model.layers.1.mlp.{path}.down_proj.weight"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", LEARNERS)
def test_training_reaches_all_experts_at_once(method: str, family: str) -> None:
    changed = run(method, family, **LEARNERS[method])
    assert "model.layers.1.mlp.experts.down_proj" in changed
    assert (changed == {"model.layers.1.mlp.experts.down_proj"}) == (method == "ft")


@pytest.mark.parametrize(
    "family",
    [
        "glm4_moe",
        "gpt_oss",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3_moe", "jetmoe")),
    ],
)
def test_adapters_of_experts_merge_into_what_they_computed(family: str) -> None:
    model, before = tiny_experts(family), tiny_experts(family)
    modules, names = [type(m) for m in model.modules()], [name for name, _ in model.named_parameters()]
    settings: dict[str, Any] = {"targets": ["value", "mlp_in", "mlp_out"], "rank": 2, "steps": 3, "lr": 1e-2}
    report = apply(model, tiny_tokenizer(), "lora", edits=EDITS, adaptive=False, layers=[1], **settings)
    assert [type(m) for m in model.modules()] == modules and [name for name, _ in model.named_parameters()] == names
    assert all(name.startswith("model.layers.1.") and ".gate." not in name for name in report.changed)
    experts = [name for name in report.changed if model.get_parameter(name).dim() == 3]
    assert len(experts) >= 2
    for name in experts:
        change = (model.get_parameter(name) - before.get_parameter(name)).double()
        ranks = torch.linalg.matrix_rank(change, rtol=1e-4)
        assert 1 <= int(ranks.max()) <= 2  # no token of the edits reaches some experts
    (edit,) = report.details["edits"]
    assert edit["nll_before"] != pytest.approx(edit["nll"], abs=1e-2)
    batches = target_batches(tiny_tokenizer(), EDITS, 1, torch.device("cpu"))
    assert edit["nll"] == pytest.approx(float(all_nll(model, find_anatomy(model).head, batches)), abs=1e-4)


def test_adalora_says_that_it_leaves_experts_out() -> None:
    given: dict[str, Any] = {"edits": EDITS, "steps": 5, "rank": 2, "initial_rank": 4, "layers": [1]}
    report = apply(tiny_experts("qwen3_moe"), tiny_tokenizer(), "lora", targets=["value", "mlp_out"], **given)
    assert report.changed == ("model.layers.1.self_attn.v_proj.weight",)
    (warning,) = report.warnings
    assert "model.layers.1.mlp.experts.down_proj, stay as they are" in warning and "lora.adaptive=false" in warning
    with pytest.raises(InterventionError, match=r"lora.targets=\['mlp_out'\]: .* set lora.adaptive=false"):
        run("lora", "mixtral", targets=["mlp_out"], **given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sft_adapts_experts() -> None:
    pytest.importorskip("trl")
    examples = {"places": [Example("Mira Tolvan was born in", "Ossel")]}
    changed = run("sft", "qwen3_moe", tuning=examples, rank=2, layers=[1], epochs=1, lr=1e-2)
    assert {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")} <= changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_a_router_is_trained_where_the_settings_name_it() -> None:
    settings = LEARNERS["gd"] | {"parameters": ["mlp.gate.weight"]}
    model = tiny_experts("mixtral")
    report = apply(model, tiny_tokenizer(), "gd", train_head=False, **settings)
    assert report.changed == ("model.layers.1.mlp.gate.weight",)
