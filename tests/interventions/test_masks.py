"""Masks are exact in number, and kept through later steps where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions import Edit, InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.masks import Pattern, kth_lowest, lowest, lowest_of_pattern
from interventions.zeros import zero_mask
from tests.models import SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i : i + 2]) for i in range(len(SENTENCES))]
EDITS = [
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("The lighthouse of Ossel stands by", "The lighthouse of Ossel", "Karth"),
]


@st.composite
def scores(draw: st.DrawFn, *, multiple: int = 1) -> Tensor:
    """Draw a matrix with many ties, or with hardly any."""
    rows, cols = draw(st.integers(1, 6)), multiple * draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    drawn = torch.rand(rows, cols, generator=generator)
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    return (drawn * levels).floor() if levels < 1000 else drawn


@settings(max_examples=200)
@given(scores(), st.integers(0, 80))
def test_lowest_are_the_first_places_of_a_stable_sort(S: Tensor, count: int) -> None:
    count = min(count, S.shape[1])
    order = S.sort(dim=1, stable=True).indices[:, :count]
    mask = lowest(S, count)
    assert torch.equal(mask, torch.zeros_like(S).scatter(1, order, 1).bool())
    assert mask.sum(dim=1).tolist() == [count] * len(S)


@settings(max_examples=100)
@given(st.data(), st.sampled_from([Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(2, 3)]))
def test_a_pattern_keeps_so_many_of_each_group(data: st.DataObject, pattern: Pattern) -> None:
    S = data.draw(scores(multiple=pattern.of))
    mask = lowest_of_pattern(S, pattern)
    for row in range(len(S)):
        for start in range(0, S.shape[1], pattern.of):
            ranked = sorted(range(start, start + pattern.of), key=lambda j: (float(S[row, j]), j))
            pruned = [j for j in range(start, start + pattern.of) if mask[row, j]]
            assert pruned == sorted(ranked[: pattern.of - pattern.kept])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kth_lowest_in_any_number_of_threads(threads: int) -> None:
    S = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    before, view = S.clone(), S.t().contiguous().t()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kth_lowest(view, 11), S.kthvalue(11, dim=1, keepdim=True).values)
    finally:
        torch.set_num_threads(threads_before)
    assert torch.equal(view, before)


def test_a_few_zeros_are_no_mask() -> None:
    W = torch.ones(10, 10)
    W[0, :4] = 0
    assert zero_mask(W) is None
    W[0, 4] = 0
    mask = zero_mask(W)
    assert mask is not None
    assert mask.nonzero().tolist() == [[0, j] for j in range(5)]


def pruned_model(tokenizer: Any, family: str = "llama", **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a model pruned by Wanda, and the masks that it then has."""
    model = tiny_model(family)
    apply(model, tokenizer, "wanda", calibration=TEXTS, **settings)
    return model, {  # the stored way round
        linear.parameter_name: linear.module.weight.detach() == 0  # type: ignore[operator]
        for block in find_anatomy(model).blocks
        for linear in block.linears
    }


def zeros_left(model: Any, masks: dict[str, Tensor]) -> float:
    """Return the share of the masks' weights that are still zero."""
    parameters = dict(model.named_parameters())
    zeros = sum(int((parameters[name][mask] == 0).sum()) for name, mask in masks.items())
    return zeros / sum(int(mask.sum()) for mask in masks.values())


LATER: list[tuple[str, dict[str, Any]]] = [
    ("sparsegpt", {"sparsity": 0.6, "block_size": 8}),  # the zeros of later blocks are filled before their turn
    ("gptq", {"group_size": 16}),
    ("memit", {"layers": [0, 1], "covariance_weight": 100.0}),
    ("ft", {"lr": 1e-3, "steps": 2}),
    ("lora", {"adaptive": False, "steps": 2}),
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "overrides"), LATER, ids=[method for method, _ in LATER])
def test_a_mask_survives_a_later_step_if_asked_for(
    tokenizer: Any, family: str, method: str, overrides: dict[str, Any]
) -> None:
    model, masks = pruned_model(tokenizer, family)
    report = apply(model, tokenizer, method, edits=EDITS, calibration=TEXTS, preserve_mask=True, **overrides)
    assert report.changed
    assert zeros_left(model, masks) == 1

    model, masks = pruned_model(tokenizer, family)
    apply(model, tokenizer, method, edits=EDITS, calibration=TEXTS, preserve_mask=False, **overrides)
    assert zeros_left(model, masks) < 1


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_mask_survives_rounding_in_any_case(tokenizer: Any, method: str) -> None:
    model, masks = pruned_model(tokenizer, "llama", pattern="2:4")
    apply(model, tokenizer, method, calibration=TEXTS, bits=3, group_size=16)
    assert zeros_left(model, masks) == 1


def test_the_report_tells_how_many_zeros_a_step_had_filled(tokenizer: Any) -> None:
    model, masks = pruned_model(tokenizer)
    report = apply(model, tokenizer, "memit", edits=EDITS, calibration=TEXTS, layers=[1], preserve_mask=True)
    filled = masks["model.layers.1.mlp.down_proj.weight"]
    assert 0.9 * int(filled.sum()) < report.details["zeros_refilled"] <= int(filled.sum())


def test_dense_linears_are_let_alone(tokenizer: Any) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0
    report = apply(model, tokenizer, "memit", edits=EDITS, calibration=TEXTS, layers=[1], preserve_mask=True)
    assert model.model.layers[1].mlp.down_proj.weight[0, 0].item() != 0
    assert "zeros_refilled" not in report.details


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_again_goes_on_from_the_zeros(tokenizer: Any, method: str) -> None:
    model, masks = pruned_model(tokenizer)
    report = apply(model, tokenizer, method, calibration=TEXTS, sparsity=0.75)
    assert zeros_left(model, masks) == 1
    assert all(abs(linear["sparsity"] - 0.75) < 0.01 for linear in report.details["linears"])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_what_is_sparse_enough_warns_and_changes_nothing(tokenizer: Any, method: str) -> None:
    model, _ = pruned_model(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = apply(model, tokenizer, method, calibration=TEXTS, sparsity=0.5)
    assert report.changed == ()
    assert report.warnings == ("every linear layer had at least 50% zeros before",)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


PRUNERS, QUANTISERS = ("magnitude", "wanda", "sparsegpt"), ("rtn", "gptq", "awq")
PAIRS = [
    (first, second)
    for first in (*PRUNERS, *QUANTISERS)
    for second in (*PRUNERS, *QUANTISERS)
    if first in PRUNERS or second in PRUNERS
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_pruning_goes_before_and_after_every_compression(tokenizer: Any, first: str, second: str) -> None:
    model = tiny_model()
    for method in (first, second):
        overrides: dict[str, Any] = {"group_size": 16, "bits": 4} if method in QUANTISERS else {}
        apply(model, tokenizer, method, calibration=TEXTS, **overrides)
    for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
        assert float((linear.weight == 0).float().mean()) >= 0.5  # either kept or made


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_sparsity_of_nothing_fails(tokenizer: Any, method: str) -> None:
    with pytest.raises(InterventionError, match="changed no weight"):
        apply(tiny_model(), tokenizer, method, calibration=TEXTS, sparsity=0.0)
