"""Scales and steps from values alone give back these very values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluators.grids import find_grid
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.kernels.integers import Integers
from pytest_lmcompose.checkpoints.grids import multiply, recover, spread, steps, zero_points

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def noise(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def given_back(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight rebuilt from its levels, which must be those of its bits, its levels and zero points."""
    grid = find_grid(weight)
    assert grid is not None
    found = recover(weight, grid.bits, grid.group_size)
    assert found is not None
    numbers = steps(weight, found.scales, grid.group_size)
    zeros = zero_points(numbers, grid.group_size, grid.bits)
    levels = numbers + spread(zeros, grid.group_size, weight.shape[1])
    levels = levels.clamp(0, 2**grid.bits - 1)
    back = multiply(levels - spread(zeros, grid.group_size, weight.shape[1]), found.scales, grid.group_size)
    return back.to(weight.dtype), found.scales, zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantised_weights_are_given_back_bit_for_bit(dtype: torch.dtype, size: int, symmetric: bool) -> None:
    for bits in range(2, 9 if dtype == torch.float32 else 8):
        weight = fake_quantise(noise(16, 320), Integers(bits, size, symmetric)).to(dtype)
        assert torch.equal(given_back(weight)[0], weight), bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_half_precision_blurs_eight_bits_by_its_rounding_alone(dtype: torch.dtype, symmetric: bool) -> None:
    weight = fake_quantise(noise(48, 320), Integers(8, 64, symmetric)).to(dtype)
    back = given_back(weight)[0]
    assert bool(((back - weight).abs() <= torch.finfo(dtype).eps * weight.abs()).all())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    size=st.sampled_from((32, 64, 96)),
    shift=st.floats(0, 1),
    pruned=st.floats(0, 0.7),
    magnitude=st.floats(1e-6, 1e3),
    sixteen=st.booleans(),
)
def test_any_grid_is_recovered(
    seed: int, bits: int, size: int, shift: float, pruned: float, magnitude: float, sixteen: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    scales = (torch.rand(6, -(-96 // size), generator=random) + 0.5) * magnitude
    if sixteen:
        scales = scales.bfloat16().float()
    zero = round(shift * (2**bits - 1))
    levels = torch.randint(0, 2**bits, (6, 96), generator=random) - zero
    levels[torch.rand(6, 96, generator=random) < pruned] = 0
    wide = scales.repeat_interleave(size, dim=1)[:, :96]
    weight = levels.float() * wide
    if find_grid(weight) is None:  # too few values
        return
    back, found, _ = given_back(weight)
    assert torch.equal(back, weight)
    assert bool((found > 0).all())


def test_scales_of_sixteen_bits_are_found_again() -> None:
    levels = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(0))
    levels[:, 0], levels[:, 1] = -8, 7
    for dtype in (torch.float16, torch.bfloat16):
        scales = (torch.rand(16, 1, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype).float()
        found = recover(levels * scales, 4, 128)
        assert found is not None and torch.equal(found.scales, scales)
        assert (found.low, found.high) == (-8, 7)


def test_groups_of_zeros_have_any_scale() -> None:
    weight = fake_quantise(noise(8, 128), Integers(4, 32))
    weight[3, 32:64] = 0
    weight[5] = 0
    back, scales, zeros = given_back(weight)
    assert torch.equal(back, weight)
    assert float(scales[3, 1]) == 1 and bool((scales[5] == 1).all())
    assert int(zeros[3, 1]) == 8


def test_a_weight_without_a_grid_has_no_scales() -> None:
    assert recover(noise(8, 128), 4, 32) is None
    assert recover(fake_quantise(noise(8, 128), Integers(4, 32)), 3, 32) is None


def test_zero_is_in_the_middle_where_all_levels_fit() -> None:
    numbers = torch.tensor([[-2, 3], [-8, 7], [0, 15], [-15, 0], [-3, 11]], dtype=torch.int16)
    assert zero_points(numbers, 2, 4).flatten().tolist() == [8, 8, 0, 15, 4]
