"""Half-quadratic quantisation, as a solver and as a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evaluators.efficiency import measure_efficiency
from evaluators.grids import find_grid
from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.hqq import HqqSettings
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.kernels.half_quadratic import shrink, solve
from interventions.compress.kernels.integers import Integers
from tests.models import CONFIGS, tiny_model

PUBLISHED: dict[str, Any] = {"p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20}


def weights(seed: int = 0, rows: int = 32, cols: int = 128) -> Tensor:
    """Weights with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator)
    return torch.where(torch.rand(rows, cols, generator=generator) < 0.02, 4 * W, W)


def distance(Q: Tensor, W: Tensor, p: float = 0.7) -> float:
    return float((Q - W).abs().pow(p).mean())


def authors(groups: Tensor, bits: int) -> Tensor:
    """The published loop on groups (rows, width): only zero points move, and all groups stop at once."""
    top = 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    inverse = top / (high - low)
    zero, beta, best = -low * inverse, 10.0, float("inf")
    for _ in range(20):
        levels = (groups * inverse + zero).round().clamp(0, top)
        rest = groups - (levels - zero) / inverse
        kept = rest.sign() * (rest.abs() - rest.abs().pow(-0.3) / beta).relu()
        zero, beta = (levels - (groups - kept) * inverse).mean(1, keepdim=True), beta * 1.01
        if (error := float(rest.abs().mean())) >= best:
            break
        best = error
    return ((groups * inverse + zero).round().clamp(0, top) - zero) / inverse


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_below_those_of_the_authors_loop_and_of_rounding(bits: int, seed: int) -> None:
    W = weights(seed)
    groups = W.view(-1, 64)
    free = HqqSettings(bits=bits, whole_zeros=False).rounded(W)
    whole = HqqSettings(bits=bits).rounded(W)
    assert distance(free, W) < distance(authors(groups, bits).view_as(W), W)
    assert distance(whole, W) < distance(fake_quantise(W, Integers(bits, 64)), W)


def test_a_turn_moves_the_zero_point_as_published() -> None:
    groups = weights().view(32, 2, 64)
    top = 7
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    s = (high - low) / top
    q = ((groups - low) / s).round()
    rest = groups - q * s - low
    kept = rest.sign() * (rest.abs() - rest.abs().pow(-0.3) / 10).relu()
    z = (q - (groups - kept) / s).mean(2, keepdim=True)
    found = solve(groups, 3, whole_zeros=False, **PUBLISHED | {"iterations": 2})
    moved = found.zeros != -low / s
    assert float(moved.float().mean()) > 0.5
    torch.testing.assert_close(found.zeros[moved], z[moved])


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_shrinking_is_the_proximal_operator_to_first_order(p: float) -> None:
    """Large values lose |x|^(p-1) / beta, small ones become zero."""
    x, beta = torch.tensor([-2.0, -0.001, 0.0, 0.001, 0.5, 3.0]), 10.0
    found = shrink(x, beta, p)
    assert found[1:4].tolist() == [0, 0, 0]
    for value, small in zip(x[[0, 4, 5]].tolist(), found[[0, 4, 5]].tolist(), strict=True):
        assert small == pytest.approx(value - (abs(value) ** (p - 1) / beta) * (1 if value > 0 else -1))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_linear_of_every_block_is_rounded_and_nothing_else(family: str) -> None:
    model, before = tiny_model(family), tiny_model(family)
    report = apply(model, None, "hqq", bits=3, group_size=16)
    names = set()
    for block, old_block in zip(find_anatomy(model).blocks, find_anatomy(before).blocks, strict=True):
        for linear, old in zip(block.linears, old_block.linears, strict=True):
            assert torch.equal(linear.weight, HqqSettings(bits=3, group_size=16).rounded(old.weight))
            names.add(linear.parameter_name)
    assert set(report.changed) == names


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_zero_points_are_a_grid_that_others_see(bits: int) -> None:
    W = HqqSettings(bits=bits, group_size=32).rounded(weights())
    found = find_grid(W)
    assert found is not None and found.bits <= bits and found.group_size == 32
    free = HqqSettings(bits=bits, group_size=32, whole_zeros=False).rounded(weights())
    assert find_grid(free) is None
    # Free or not, a group has no more values than levels.
    assert all(len(group.unique()) <= 2**bits for group in (*free.view(-1, 32)[:20], *W.view(-1, 32)[:20]))


def test_the_promise_is_kept_or_not_made() -> None:
    for whole, bits in ((True, 4), (False, 32)):
        model = tiny_model("llama")
        report = apply(model, None, "hqq", group_size=32, whole_zeros=whole)
        found = next(m for m in measure_efficiency(model) if m.metric == "average_bits")
        assert found.value == pytest.approx(bits)
        assert report.promises == ({"average_bits": 4} if whole else {})
        assert any("average_bits and packed formats see weights in full" in w for w in report.warnings) != whole


def test_a_pruned_weight_stays_at_zero() -> None:
    W = weights()
    W[W < 0.1] = 0  # what is left has one sign
    assert bool((HqqSettings(bits=2, group_size=7).rounded(W)[W == 0] == 0).all())
    assert HqqSettings().keeps("sparsity") and not HqqSettings(whole_zeros=False).keeps("sparsity")


def test_odd_groups_and_groups_of_equal_weights() -> None:
    for W in (torch.zeros(4, 64), torch.full((4, 64), -0.3), weights(cols=45), weights()[:, :1]):
        for whole in (True, False):
            for size in (-1, 16):
                Q = HqqSettings(group_size=size, whole_zeros=whole).rounded(W)
                assert Q.shape == W.shape and bool(torch.isfinite(Q).all())
                assert float((Q - W).abs().max()) <= float(W.max() - W.min()) + 1e-6
    assert torch.equal(HqqSettings().rounded(torch.zeros(4, 64)), torch.zeros(4, 64))


def test_settings_that_cannot_be_are_named() -> None:
    for options, message in (
        ({"bits": 9}, "hqq.bits=9"),
        ({"lp_norm": 1.0}, "hqq.lp_norm=1.0: expected a number above 0 to less than 1"),
        ({"kappa": 0.9}, "hqq.kappa=0.9"),
    ):
        with pytest.raises(InterventionError, match=message):
            apply(tiny_model("llama"), None, "hqq", **options)
