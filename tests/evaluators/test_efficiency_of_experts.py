"""Bits, zeros and sizes of experts, whichever way they are stored."""

from __future__ import annotations

import pytest
import torch

from evaluators.efficiency import decoder_linears, measure_efficiency
from interventions import apply
from interventions.anatomy import find_anatomy
from tests.experts import tiny_experts
from tests.models import tiny_tokenizer

FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "glm4_moe", "phimoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_those_that_methods_change(family: str) -> None:
    model = tiny_experts(family)
    found = decoder_linears(model)
    linears = {
        linear.name if linear.part else linear.parameter_name: linear
        for block in find_anatomy(model).blocks
        for linear in block.linears
    }
    assert found.keys() == linears.keys()
    assert all(torch.equal(weight, linears[name].weight) for name, weight in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_rounded_experts(family: str) -> None:
    model = tiny_experts(family)
    apply(model, tiny_tokenizer(), "rtn", bits=3, group_size=-1)
    found = {m.metric: m for m in measure_efficiency(model, length=16)}
    assert found["average_bits"].value == pytest.approx(3)
    assert found["average_bits"].n == len(decoder_linears(model))


def test_one_expert_off_its_grid_counts_at_full_precision() -> None:
    model = tiny_experts("gpt_oss")
    apply(model, tiny_tokenizer(), "rtn", bits=3, group_size=-1)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5].add_(torch.randn(24, 32) * 0.01)
    found = {m.metric: m for m in measure_efficiency(model, length=16)}
    names = list(decoder_linears(model))
    bits = dict(zip(names, found["average_bits"].samples or (), strict=True))
    assert {name for name, value in bits.items() if value > 3} == {"model.layers.1.mlp.experts.down_proj.5"}


def test_zeros_of_experts() -> None:
    model = tiny_experts("qwen3_moe")
    apply(model, tiny_tokenizer(), "magnitude", sparsity=0.5)
    found = {m.metric: m for m in measure_efficiency(model, length=16)}
    assert found["sparsity"].value == pytest.approx(0.5, abs=0.01)
