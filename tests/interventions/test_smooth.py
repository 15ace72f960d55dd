"""SmoothQuant's migration of scales, as a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.offload import offload
from tests.models import CONFIGS, SENTENCES, VOCABULARY, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]
ALL = ["attention_in", "attention_out", "mlp_in", "mlp_out"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(1))
    return model(ids).logits.float()  # type: ignore[no-any-return]


def off(found: Tensor, wanted: Tensor) -> float:
    """The greatest difference, over the range of the logits."""
    return float((found - wanted).abs().max() / (wanted.max() - wanted.min()))


@torch.no_grad()
def greatest(model: Any, module: torch.nn.Module, tokenizer: Any) -> Tensor:
    """The greatest magnitude of each channel of a module's input on the calibration text."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).abs().amax(0)))
    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    size = 64 - len(start)
    for low in range(0, len(ids), size):
        model(torch.tensor([start + ids[low : low + size]]))
    handle.remove()
    return torch.stack(seen).amax(0)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_logits_stay_and_groups_left_out_are_named_once(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    wanted = logits(model)
    groups = [group for block in find_anatomy(model).blocks for group in block.linear_groups]
    able = [[linear.name for linear in group.linears] for group in groups if group.previous is not None]
    report = apply(model, tokenizer, "smooth", calibration=TEXTS, max_tokens=64, targets=ALL)
    assert off(logits(model), wanted) < 1e-4
    assert [entry["linears"] for entry in report.details["groups"]] == able
    assert sum("stay as they are" in warning for warning in report.warnings) == (len(able) < len(groups))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_factors_are_those_of_the_paper(alpha: float, tokenizer: Any) -> None:
    model, before = tiny_model("llama"), tiny_model("llama")
    apply(model, tokenizer, "smooth", calibration=TEXTS, max_tokens=64, alpha=alpha)
    for new, old in zip(model.model.layers, before.model.layers, strict=True):
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            linears = [old.get_submodule(name) for name in names]
            x_max = greatest(before, linears[0], tokenizer)
            w_max = torch.cat([linear.weight for linear in linears]).abs().amax(dim=0)
            s = x_max.pow(alpha) / w_max.pow(1 - alpha)
            torch.testing.assert_close(new.get_submodule(norm).weight, old.get_submodule(norm).weight / s)
            for name, linear in zip(names, linears, strict=True):
                torch.testing.assert_close(new.get_submodule(name).weight, linear.weight * s)
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight)


def test_an_outlier_of_the_input_becomes_small(tokenizer: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = 100
    report = apply(model, tokenizer, "smooth", calibration=TEXTS, max_tokens=64)
    entry = next(e for e in report.details["groups"] if e["linears"][0] == "model.layers.1.mlp.gate_proj")
    before, after = entry["peak"]
    assert before > 50 and after < before / 3


def test_dead_channels_and_pruned_weights(tokenizer: Any) -> None:
    model = tiny_model("llama")
    block = model.model.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight[3] = 0
        block.mlp.gate_proj.weight[:, 7] = 0
        block.mlp.up_proj.weight[:, 7] = 0
        block.self_attn.q_proj.weight[::2] = 0
    wanted, zeros = logits(model), {name: p == 0 for name, p in model.named_parameters()}
    norm = block.post_attention_layernorm.weight[7].clone()
    apply(model, tokenizer, "smooth", calibration=TEXTS, max_tokens=64)
    assert off(logits(model), wanted) < 1e-4
    assert all(torch.equal(p == 0, zeros[name]) for name, p in model.named_parameters())
    assert torch.equal(block.post_attention_layernorm.weight[7], norm)


def test_offloaded_models_and_half_precision(tokenizer: Any) -> None:
    plain, host = tiny_model("llama"), tiny_model("llama")
    offload(host, torch.device("cpu"))
    for model in (plain, host):
        apply(model, tokenizer, "smooth", calibration=TEXTS, max_tokens=64)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), host.parameters(), strict=True))
    half = tiny_model("llama", dtype=torch.bfloat16)
    apply(half, tokenizer, "smooth", calibration=TEXTS, max_tokens=64)
    assert off(logits(half), logits(tiny_model("llama"))) < 0.05


def test_a_quantiser_follows(tokenizer: Any) -> None:
    model, wanted = tiny_model("llama"), logits(tiny_model("llama"))
    apply(model, tokenizer, "smooth", calibration=TEXTS, max_tokens=64)
    apply(model, tokenizer, "rtn", bits=8)
    assert off(logits(model), wanted) < 0.02


def test_what_cannot_be_done_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=r"smooth: nothing before transformer.h.0.attn.q_proj, or any other"):
        apply(tiny_model("gptj"), tokenizer, "smooth", calibration=TEXTS, max_tokens=64)
    with pytest.raises(InterventionError, match="smooth needs calibration texts"):
        apply(tiny_model("llama"), tokenizer, "smooth")
    for settings, message in (
        ({"alpha": 1.5}, "smooth.alpha=1.5: expected a number from 0 to 1"),
        ({"targets": ["mlp"]}, "smooth.targets="),
        ({"engine": "autoawq"}, "smooth has no engine 'autoawq'"),
    ):
        with pytest.raises(InterventionError, match=message):
            apply(tiny_model("llama"), tokenizer, "smooth", calibration=TEXTS, **settings)
