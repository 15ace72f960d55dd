"""Rounding to nearest, as a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.kernels.integers import Integers
from tests.models import CONFIGS, tiny_model


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_linear_of_every_block_is_rounded_and_nothing_else(family: str, symmetric: bool) -> None:
    model, before = tiny_model(family), tiny_model(family)
    report = apply(model, None, "rtn", bits=3, group_size=16, symmetric=symmetric)
    names = set()
    for block, old_block in zip(find_anatomy(model).blocks, find_anatomy(before).blocks, strict=True):
        for linear, old in zip(block.linears, old_block.linears, strict=True):
            assert torch.equal(
                linear.weight, fake_quantise(old.weight, Integers(3, 16, symmetric, scales=torch.float16))
            )
            names.add(linear.parameter_name)
    assert set(report.changed) == names


@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.6), (4, 0.12), (8, 0.01)])
def test_the_distance_moved_is_told(bits: int, at_most: float) -> None:
    model, before = tiny_model("llama"), dict(tiny_model("llama").named_parameters())
    report = apply(model, None, "rtn", bits=bits, group_size=-1)
    for entry in report.details["linears"]:
        old, new = (p[f"{entry['linear']}.weight"].detach() for p in (before, dict(model.named_parameters())))
        assert entry["moved"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        assert 0 < entry["moved"] < at_most


def test_a_pruned_weight_stays_at_zero() -> None:
    model = tiny_model("llama")
    linears = [linear for block in find_anatomy(model).blocks for linear in block.linears]
    for linear in linears:
        linear.weight[linear.weight < 0.05] = 0  # what is left has one sign
    masks = [linear.weight == 0 for linear in linears]
    apply(model, None, "rtn", bits=2, group_size=7)
    assert all(bool((linear.weight[mask] == 0).all()) for linear, mask in zip(linears, masks, strict=True))


def test_the_second_time_is_no_failure() -> None:
    model = tiny_model("llama", dtype=torch.float16)
    settings: dict[str, Any] = {"bits": 3, "group_size": 16, "symmetric": True}
    apply(model, None, "rtn", **settings)
    again = apply(model, None, "rtn", **settings)
    assert again.changed == () or max(entry["moved"] for entry in again.details["linears"]) < 1e-3


def test_bad_weights_and_settings_are_named_and_the_model_stays() -> None:
    for bits in (1, 9):
        with pytest.raises(InterventionError, match=f"rtn.bits={bits}: expected a whole number from 2 to 8"):
            apply(tiny_model("llama"), None, "rtn", bits=bits)
    with pytest.raises(InterventionError, match="group_size"):
        apply(tiny_model("llama"), None, "rtn", group_size=-2)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(InterventionError, match=r"model.layers.1.mlp.down_proj.weight has NaN"):
        apply(model, None, "rtn")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
