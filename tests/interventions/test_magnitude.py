"""Magnitude pruning takes the smallest weights, and the right number of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from tests.models import CONFIGS, tiny_model


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(tokenizer: Any, family: str) -> None:
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply(model, tokenizer, "magnitude", sparsity=0.3)
    for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
        stored, was = dict(model.named_parameters())[linear.parameter_name], before.pop(linear.parameter_name)
        zero = stored == 0
        assert int(zero.sum()) == int(0.3 * was.numel())
        assert torch.equal(stored[~zero], was[~zero])
        assert float(was[zero].abs().max()) <= float(was[~zero].abs().min())
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({"sparsity": 0.5}, [0, 0, 0, 4, 0, 6, 7, 8]),
        ({"sparsity": 0.5, "among": "row"}, [0, 0, 0, 0, 5, 6, 7, 8]),
        ({"sparsity": 0.5, "pattern": "2:4"}, [0, 0, 3, 4, 0, 0, 7, 8]),
        ({"sparsity": 0.75, "pattern": "1:4"}, [0, 0, 0, 4, 0, 0, 0, 8]),
    ],
)
def test_what_a_weight_is_compared_with(tokenizer: Any, settings: dict[str, Any], row: list[int]) -> None:
    model = tiny_model()
    weight = model.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight.fill_(10)
        weight[0] = torch.arange(1, 9).repeat(4)
        if settings == {"sparsity": 0.5}:  # half of all, of which all but a quarter of this row's are smaller
            weight[1:16] = 0.5
            weight[16, :16] = 0.5
            weight[0] = torch.tensor([1, 2, 3, 14, 4, 16, 17, 18]).repeat(4)
            row = [0, 0, 0, 14, 0, 16, 17, 18]
    apply(model, tokenizer, "magnitude", **settings)
    assert weight[0].tolist() == row * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.2}, "magnitude.sparsity"),
        ({"sparsity": float("nan")}, "magnitude.sparsity"),
        ({"among": "model"}, "magnitude.among=model: expected one of layer, row"),
    ],
)
def test_bad_settings_are_named(tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        apply(tiny_model(), tokenizer, "magnitude", **settings)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(tokenizer: Any, method: str, value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InterventionError, match=rf"{method}: model\.layers\.1\.mlp\.up_proj\.weight has NaN or inf"):
        apply(model, tokenizer, method, calibration=["some text of enough tokens to prune by " * 9])
    assert all(torch.equal(before[name].nan_to_num(), p.nan_to_num()) for name, p in model.named_parameters())
