"""Properties of the integer grids, on matrices of any shape and scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.compress.kernels.grid import dequantise, fake_quantise, join_groups, quantise, split_groups

SIZES = st.integers(1, 12)
BITS = st.integers(2, 8)
GROUPS = st.sampled_from([-1, 1, 3, 4, 128])
NUMBERS = st.floats(-100, 100, width=32)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Draw a matrix of few distinct numbers (ties, constants, zeros) or of random ones."""
    rows, cols = draw(SIZES), draw(SIZES)
    if draw(st.booleans()):
        few = draw(st.lists(NUMBERS, min_size=1, max_size=4))
        cells = draw(st.lists(st.sampled_from(few), min_size=rows * cols, max_size=rows * cols))
        return torch.tensor(cells).view(rows, cols)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    return torch.randn(rows, cols, generator=generator) * scale + draw(st.sampled_from([0.0, scale, -3 * scale]))


def expand(per_group: Tensor, W: Tensor, group_size: int) -> Tensor:
    width = split_groups(W, group_size).shape[2]
    return per_group.repeat_interleave(width, dim=1)[:, : W.shape[1]]


@settings(max_examples=200)
@given(matrices(), BITS, GROUPS, st.booleans())
def test_no_weight_moves_by_more_than_half_a_step(W: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    quantised = quantise(W, bits, group_size, symmetric)
    step = expand(quantised.scales, W, group_size)
    error = (dequantise(quantised) - W).abs()
    assert bool((error <= 0.5 * step * (1 + 1e-4) + 1e-30).all())


@settings(max_examples=200)
@given(matrices(), BITS, GROUPS, st.booleans())
@example(torch.tensor([[-0.5, 2.5, 1.0]]), 2, -1, False)  # the zero point is half-way between two levels
def test_a_matrix_on_its_grid_stays_there(W: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    once = fake_quantise(W, bits, group_size, symmetric)
    twice = fake_quantise(once, bits, group_size, symmetric)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5 * float(W.abs().max()))


@settings(max_examples=100)
@given(matrices(), BITS, GROUPS, st.booleans())
def test_values_are_integers_of_that_many_bits_and_zero_stays_zero(
    W: Tensor, bits: int, group_size: int, symmetric: bool
) -> None:
    W[0, 0] = 0.0
    quantised = quantise(W, bits, group_size, symmetric)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert quantised.values.shape == W.shape
    assert low <= int(quantised.values.min()) and int(quantised.values.max()) <= high
    assert bool((quantised.zeros == quantised.zeros.round()).all())
    assert bool((quantised.scales > 0).all())
    assert dequantise(quantised)[0, 0] == 0
    torch.testing.assert_close(dequantise(quantised), fake_quantise(W, bits, group_size, symmetric))


@settings(max_examples=100)
@given(matrices(), GROUPS)
def test_groups_fall_apart_and_together_again(W: Tensor, group_size: int) -> None:
    groups = split_groups(W, group_size)
    assert torch.equal(join_groups(groups, W.shape[1]), W)
    assert groups.sum() == pytest.approx(float(W.sum()), rel=1e-4, abs=1e-3 * float(W.abs().max()) + 1e-9)


def test_each_group_is_rounded_by_itself() -> None:
    W = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    whole = fake_quantise(W, 3, 4)
    for start in (0, 4, 8):  # the last group has two columns
        part = W[:, start : start + 4]
        assert torch.equal(whole[:, start : start + 4], fake_quantise(part, 3, -1))


def test_a_known_row() -> None:
    quantised = quantise(torch.tensor([[-1.0, -0.3, 0.6, 2.0]]), 2, -1)
    assert quantised.values.tolist() == [[0, 1, 2, 3]]
    assert quantised.scales.tolist() == [[1.0]]
    assert quantised.zeros.tolist() == [[1.0]]
    assert dequantise(quantised).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("value", [0.0, 1e-42, 3.0, -7.5])
def test_constant_rows(value: float) -> None:
    W = torch.full((2, 6), value)
    for symmetric in (False, True):
        torch.testing.assert_close(fake_quantise(W, 4, 4, symmetric), W, rtol=1e-6, atol=1e-40)


def test_an_empty_matrix() -> None:
    assert fake_quantise(torch.zeros(3, 0), 4, 128).shape == (3, 0)
    assert fake_quantise(torch.zeros(0, 5), 4, 2).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_with_room_beyond_the_weights_is_found_again(symmetric: bool, dtype: torch.dtype) -> None:
    """Levels of 4 bits of which the outermost are not used, in wide groups."""
    generator = torch.Generator().manual_seed(2)
    low, high = (-6, 5) if symmetric else (-4, 9)
    levels = torch.randint(low, high + 1, (50, 64), generator=generator)
    W = (levels * torch.rand(50, 1, generator=generator).add(0.1)).to(dtype).float()
    assert float((fake_quantise(W, 4, 32, symmetric) - W).norm() / W.norm()) < 4 * torch.finfo(dtype).eps


def test_the_greatest_weight_lies_half_a_step_beyond_a_symmetric_grid() -> None:
    W = torch.linspace(-0.99, 1, 64).view(1, -1)
    quantised = quantise(W, 3, -1, symmetric=True)
    assert float(quantised.scales) == pytest.approx(2 / 7)
    assert quantised.values.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
