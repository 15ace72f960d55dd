"""Which grid a weight lies on, found from its values alone."""

from __future__ import annotations

import math
from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluators.grids import Grid, find_grid, fit_steps

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def noise(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))


def rounded(weight: Tensor, bits: int, size: int, symmetric: bool = False) -> Tensor:
    """Round to a min-max grid by group, an independent formulation: level by level, in float64."""
    rows, cols = weight.shape
    result = torch.empty_like(weight, dtype=torch.float64)
    for row in range(rows):
        for start in range(0, cols, size):
            group = weight[row, start : start + size].double()
            low, high = min(0.0, group.min().item()), max(0.0, group.max().item())
            if symmetric:
                step = max(-low, high) / (2 ** (bits - 1) - 1)
                lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            else:
                step = (high - low) / (2**bits - 1)
                lowest = -round(-low / step)
                highest = lowest + 2**bits - 1
            levels = torch.arange(lowest, highest + 1, dtype=torch.float64) * step
            nearest = (group.unsqueeze(1) - levels).abs().argmin(dim=1)
            result[row, start : start + size] = levels[nearest]
    return result.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rounded_weight_is_recognised(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = rounded(noise(12, 128), bits, 64, symmetric).to(dtype)
    found = find_grid(weight)
    assert found is not None
    # Two symmetric bits are -1, 0 and 1: any coarser grid than 2 bits is one of 2 bits too.
    assert (found.bits, found.group_size, found.groups) == (bits, 64, 24)


@pytest.mark.parametrize("size", [32, 64, 128, 256, 320])
def test_the_size_of_groups_is_found(size: int) -> None:
    found = find_grid(rounded(noise(8, 320), 4, size))
    assert found == Grid(4, size, 8 * 320 // gcd(320, size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_as_trained_is_on_no_grid(dtype: torch.dtype) -> None:
    for seed in range(3):
        assert find_grid(noise(16, 128, seed).to(dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_of_one_row_moves_a_layer_off_its_grid(dtype: torch.dtype) -> None:
    weight = rounded(noise(40, 128), 4, 128)
    weight[17] += 0.02 * noise(1, 128, 1)[0]
    assert find_grid(weight.to(dtype)) is None


def test_zeros_on_a_grid_are_levels_of_it() -> None:
    weight = rounded(noise(16, 256), 4, 128)
    pruned = weight * (noise(16, 256, 2) > 0)
    pruned[3] = 0
    assert find_grid(pruned) == Grid(4, 128, 32)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_a_pruned_weight_is_on_no_grid(share: float) -> None:
    """However few values are left: each would fit a grid of its own."""
    for dtype in DTYPES:
        weight = noise(64, 256) * (torch.rand(64, 256, generator=torch.Generator().manual_seed(3)) >= share)
        assert find_grid(weight.to(dtype)) is None


@settings(max_examples=12)
@given(
    bits=st.integers(2, 8),
    scale=st.floats(1e-4, 1e4),
    cols=st.integers(33, 200),
    seed=st.integers(0, 1000),
)
def test_whole_rows_of_any_width_and_scale(bits: int, scale: float, cols: int, seed: int) -> None:
    found = find_grid(rounded(noise(6, cols, seed) * scale, bits, cols))
    assert found is not None and found.bits == bits
    assert find_grid(noise(6, cols, seed) * scale) is None


SCHEMES = ["NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16", "FP8A16", "FP8A16_CHANNEL", "FP8A16_BLOCK"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_floating_point_numbers_are_recognised(scheme: str, dtype: torch.dtype) -> None:
    from interventions.compress.kernels.formats import grid_of
    from interventions.compress.kernels.grid import fake_quantise
    from interventions.compress.schemes import SCHEMES

    chosen = SCHEMES[scheme]
    for seed in range(3):
        weight = (noise(150, 256, seed) * 0.03).to(dtype)
        found = find_grid(fake_quantise(weight, grid_of(chosen, dtype)).to(dtype))
        assert found is not None and found.floats is not None
        scales = {"NVFP4A16": 150 * 16, "FP8A16": 1, "FP8A16_CHANNEL": 150, "FP8A16_BLOCK": 4}.get(scheme, 150 * 8)
        width = 256 if chosen.group_size < 0 else chosen.group_size
        assert (found.bits, found.group_size, found.groups) == (chosen.bits, width, scales)
        bits = {"NVFP4A16": 8 * scales + 32}.get(scheme, (8 if scheme.startswith("MX") else 16) * scales)
        assert found.overhead_bits == bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_levels_are_integers(bits: int) -> None:
    found = find_grid(rounded(noise(12, 128), bits, 32))
    assert found == Grid(bits, 32, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numbers", [(3, -5, 7, 0), (4, 6, -10, 0), (-1, 0, 2, 6), (2, 2, -2, 0), (15, -13, 11, 0)])
def test_the_coarsest_steps_are_found_whatever_the_least_magnitude_is(
    dtype: torch.dtype, numbers: tuple[int, ...]
) -> None:
    groups = (torch.tensor([numbers * 4, numbers * 4]) * torch.tensor([[0.013], [0.7]])).to(dtype)
    found = fit_steps(groups.float(), 64, torch.finfo(dtype).eps)
    assert found is not None
    step = math.gcd(*numbers)
    assert found.steps.tolist() == [max(map(abs, numbers)) // step] * 2
    assert found.levels.tolist() == [(max(numbers) - min(*numbers, 0)) // step + 1] * 2
    assert fit_steps(torch.cat([groups.float(), noise(2, 16)]), 64, torch.finfo(dtype).eps) is None
