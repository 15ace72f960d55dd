"""Properties of the integer grids, on matrices of any shape and scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions.compress.kernels.grid import fake_quantise, join_groups, split_groups
from interventions.compress.kernels.integers import Integers

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


def steps_of(W: Tensor, grid: Integers, refit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return W's values on its grid in steps, the step of each, and the smallest number of steps in its group."""
    groups = split_groups(W, grid.group_size)
    scales, least, _ = grid.scaling(groups, refit=refit)
    least = torch.full_like(scales, least) if isinstance(least, int) else least
    step, least = (join_groups(x.expand_as(groups), W.shape[1]) for x in (scales, least))
    return fake_quantise(W, grid, refit=refit) / step, step, least


@settings(max_examples=200)
@given(matrices(), BITS, GROUPS, st.booleans())
def test_no_weight_moves_by_more_than_half_a_step(W: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    numbers, step, _ = steps_of(W, Integers(bits, group_size, symmetric))
    error = (numbers * step - W).abs()
    assert bool((error <= 0.5 * step * (1 + 1e-4) + 1e-30).all())


@settings(max_examples=200)
@given(matrices(), BITS, GROUPS, st.booleans(), st.sampled_from([torch.float16, torch.bfloat16]))
@example(torch.tensor([[-1.0, -3.0, -2.5]]), 8, -1, False, torch.bfloat16)  # the zero point is the last level
@example(torch.full((1, 4), 3e-7), 4, -1, True, torch.float16)  # a scale with one digit
@example(torch.tensor([[1e-9, 2e-9]]), 4, -1, False, torch.float16)  # and none
@example(torch.tensor([[1e9, 2e9]]), 4, -1, False, torch.float16)  # beyond float16
def test_scales_of_new_grids_have_sixteen_bits(
    W: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    grid = Integers(bits, group_size, symmetric, scales=dtype)
    numbers, step, _ = steps_of(W, grid, refit=True)
    fits = step.to(dtype).isfinite()
    assert torch.equal(step[fits].to(dtype).float(), step[fits])
    assert bool((step > 0).all())
    # A weight at the end of its group lies beyond the last level by the rounding of as many steps.
    beyond = 2**bits * max(torch.finfo(dtype).eps / 2, 2**-9)
    assert bool(((numbers * step - W).abs() <= step * (0.5 + beyond) * (1 + 1e-4)).all())


@settings(max_examples=200)
@given(matrices(), BITS, GROUPS, st.booleans())
@example(torch.tensor([[-0.5, 2.5, 1.0]]), 2, -1, False)  # the zero point is half-way between two levels
def test_a_matrix_on_its_grid_stays_there(W: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    grid = Integers(bits, group_size, symmetric)
    once = fake_quantise(W, grid)
    twice = fake_quantise(once, grid)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5 * float(W.abs().max()))


@settings(max_examples=100)
@given(matrices(), BITS, GROUPS, st.booleans())
def test_values_are_integers_of_that_many_bits_and_zero_stays_zero(
    W: Tensor, bits: int, group_size: int, symmetric: bool
) -> None:
    W[0, 0] = 0.0
    numbers, step, least = steps_of(W, Integers(bits, group_size, symmetric))
    levels = numbers - least
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert float(levels.min()) >= -1e-3 and float(levels.max()) <= 2**bits - 1 + 1e-3
    assert torch.equal(least, least.round())
    assert bool((step > 0).all())
    assert numbers[0, 0] == 0


@settings(max_examples=100)
@given(matrices(), GROUPS)
def test_groups_fall_apart_and_together_again(W: Tensor, group_size: int) -> None:
    groups = split_groups(W, group_size)
    assert torch.equal(join_groups(groups, W.shape[1]), W)
    assert groups.sum() == pytest.approx(float(W.sum()), rel=1e-4, abs=1e-3 * float(W.abs().max()) + 1e-9)


def test_each_group_is_rounded_by_itself() -> None:
    W = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    whole = fake_quantise(W, Integers(3, 4))
    for start in (0, 4, 8):  # the last group has two columns
        part = W[:, start : start + 4]
        assert torch.equal(whole[:, start : start + 4], fake_quantise(part, Integers(3)))


def test_a_known_row() -> None:
    W = torch.tensor([[-1.0, -0.3, 0.6, 2.0]])
    scales, least, greatest = Integers(2).scaling(W.unsqueeze(1))
    assert (scales.tolist(), least.tolist(), greatest.tolist()) == ([[[1.0]]], [[[-1.0]]], [[[2.0]]])
    assert fake_quantise(W, Integers(2)).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("value", [0.0, 1e-42, 3.0, -7.5])
def test_constant_rows(value: float) -> None:
    W = torch.full((2, 6), value)
    for symmetric in (False, True):
        torch.testing.assert_close(fake_quantise(W, Integers(4, 4, symmetric)), W, rtol=1e-6, atol=1e-40)


def test_an_empty_matrix() -> None:
    assert fake_quantise(torch.zeros(3, 0), Integers(4, 128)).shape == (3, 0)
    assert fake_quantise(torch.zeros(0, 5), Integers(4, 2)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_with_room_beyond_the_weights_is_found_again(symmetric: bool, dtype: torch.dtype) -> None:
    """Levels of 4 bits of which the outermost are not used, in wide groups."""
    generator = torch.Generator().manual_seed(2)
    low, high = (-6, 5) if symmetric else (-4, 9)
    levels = torch.randint(low, high + 1, (50, 64), generator=generator)
    W = (levels * torch.rand(50, 1, generator=generator).add(0.1)).to(dtype).float()
    assert float((fake_quantise(W, Integers(4, 32, symmetric)) - W).norm() / W.norm()) < 4 * torch.finfo(dtype).eps


def test_the_greatest_weight_lies_half_a_step_beyond_a_symmetric_grid() -> None:
    W = torch.linspace(-0.99, 1, 64).view(1, -1)
    numbers, step, _ = steps_of(W, Integers(3, symmetric=True))
    assert float(step[0, 0]) == pytest.approx(2 / 7)
    assert numbers.round().unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
