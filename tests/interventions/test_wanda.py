"""Wanda against a plain sort on the inputs of each layer, and the promises of the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.masks import Pattern
from interventions.compress.wanda import wanda_mask
from interventions.statistics import window_batches
from tests.models import CONFIGS, SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]


def sorted_mask(W: Tensor, norms: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Sort each row, or each group of a pattern, by hand."""
    mask = torch.zeros_like(W, dtype=torch.bool)
    width, count = (W.shape[1], int(sparsity * W.shape[1])) if pattern is None else (pattern.of, 0)
    if pattern is not None:
        count = pattern.of - pattern.kept
    for row in range(W.shape[0]):
        for start in range(0, W.shape[1], width):
            importance = [abs(float(W[row, j] * norms[j])) for j in range(start, start + width)]
            for j in sorted(range(width), key=lambda j: importance[j])[:count]:
                mask[row, start + j] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77])
def test_the_mask_is_that_of_a_plain_sort(sparsity: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 57, generator=generator).to(dtype)  # many ties in bfloat16
    norms = torch.rand(57, generator=generator).round(decimals=1)
    assert torch.equal(wanda_mask(W, norms, sparsity), sorted_mask(W.float(), norms, sparsity))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)])
def test_the_pattern_is_that_of_a_plain_sort(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    W, norms = torch.randn(20, 56, generator=generator), torch.rand(56, generator=generator)
    assert torch.equal(wanda_mask(W, norms, 0.5, pattern), sorted_mask(W, norms, 0.5, pattern))


# The step


@torch.no_grad()
def test_each_block_is_judged_by_the_inputs_that_the_pruned_ones_before_it_make(tokenizer: Any) -> None:
    """Prune a second model by hand: inputs seen by hooks on whole forward passes, one window at a time."""
    model, other = tiny_model(), tiny_model()
    apply(model, tokenizer, "wanda", calibration=TEXTS, sparsity=0.4, max_tokens=30, samples=5)
    for block in find_anatomy(other).blocks:
        squares: dict[str, Tensor] = {}

        def see(name: str, squares: dict[str, Tensor] = squares) -> Any:
            def add(module: Any, arguments: Any) -> None:
                total = arguments[0][0].pow(2).sum(dim=0)
                squares[name] = squares[name] + total if name in squares else total

            return add

        handles = [linear.module.register_forward_pre_hook(see(linear.name)) for linear in block.linears]
        (batch,) = window_batches(tokenizer, TEXTS, samples=5, max_tokens=30)
        for row in batch["input_ids"]:
            other(row[None])
        for handle in handles:
            handle.remove()
        for linear in block.linears:
            mask = sorted_mask(linear.weight, squares[linear.name].sqrt(), 0.4)
            linear.set_weight_(linear.weight.masked_fill(mask, 0))
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(tokenizer: Any, family: str) -> None:
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = apply(model, tokenizer, "wanda", calibration=TEXTS, sparsity=0.3, max_tokens=64)
    linears = [linear for block in find_anatomy(model).blocks for linear in block.linears]
    assert sorted(linear.parameter_name for linear in linears) == list(report.changed)
    for linear in linears:
        zeros = (linear.weight == 0).sum(dim=1)
        assert zeros.tolist() == [int(0.3 * linear.in_features)] * linear.out_features
    for name, parameter in model.named_parameters():
        assert bool(((parameter == before[name]) | (parameter == 0)).all())


def test_the_stored_dtype_is_kept(tokenizer: Any) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    apply(model, tokenizer, "wanda", calibration=TEXTS, pattern="2:4")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert bool(((weight == 0).view(48, 8, 4).sum(dim=2) == 2).all())


@pytest.mark.parametrize(
    ("settings", "calibration", "message"),
    [
        ({"sparsity": 1.0}, TEXTS, "wanda.sparsity"),
        ({"pattern": "4:2"}, TEXTS, "pattern=4:2"),
        ({}, [], "wanda needs calibration texts"),
        ({}, ["", "some text"], "text 0 is empty"),
        ({}, ["a"], "too few for the 32 columns"),
    ],
)
def test_bad_input_is_named(tokenizer: Any, settings: dict[str, Any], calibration: list[str], message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        apply(tiny_model(), tokenizer, "wanda", calibration=calibration, **settings)
