"""Integer grids for weight matrices: pure functions on tensors.

A row of W (rows, cols) is cut into groups of `group_size` columns; -1, or more columns than
there are, makes the row one group, and the last group of an odd width is shorter. A group has
2**bits evenly spaced levels, zero always among them: `W ~ (values - zeros) * scales`.

Asymmetric grids span the group's least to its greatest value and zero. (For a group of one sign
AWQ's reference implementations leave zero out of the span but cannot move the zero point beyond
the grid, which cuts off such weights.) Symmetric grids have 2**(b-1) levels below zero and one less
above; as in GPTQ's reference implementation the greatest magnitude lies half a step beyond the
upper end, so that it moves by half a step like any other. A group that lies on a grid stays there,
as far as it can be told.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Quantised(NamedTuple):
    """A matrix on its grid."""

    values: Tensor
    """(rows, cols) int16; 0 .. 2**bits - 1, or signed for a symmetric grid."""
    scales: Tensor
    """(rows, groups) float32, positive."""
    zeros: Tensor
    """(rows, groups) float32, whole numbers: the level of 0."""
    group_size: int


def width_of_group(cols: int, group_size: int) -> int:
    """Return the width of a full group: `group_size`, or all columns if that is -1 or too wide."""
    return cols if group_size < 0 or group_size > cols else group_size


def split_groups(W: Tensor, group_size: int) -> Tensor:
    """Return W (rows, cols) as (rows, groups, group width), a view unless the last group is padded with zeros."""
    rows, cols = W.shape
    width = max(1, width_of_group(cols, group_size))
    groups = -(-cols // width)
    missing = groups * width - cols
    return (pad(W, (0, missing)) if missing else W).reshape(rows, groups, width)


def join_groups(groups: Tensor, cols: int) -> Tensor:
    """Undo `split_groups`: (rows, groups, width) to (rows, cols)."""
    return groups.reshape(groups.shape[0], groups.shape[1] * groups.shape[2])[:, :cols]


def quantise(W: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Quantised:
    """Round W (rows, cols) to the nearest levels of the grids of its groups."""
    groups = split_groups(W.float(), group_size)
    scales, zeros = find_grid(groups, bits, symmetric)
    values = _values(groups, scales, zeros, bits, symmetric)
    return Quantised(join_groups(values, W.shape[1]).to(torch.int16), scales.squeeze(2), zeros.squeeze(2), group_size)


def dequantise(quantised: Quantised) -> Tensor:
    """Return the de-quantised matrix, (rows, cols) float32."""
    groups = split_groups(quantised.values.float(), quantised.group_size)
    weights = (groups - quantised.zeros.unsqueeze(2)) * quantised.scales.unsqueeze(2)
    return join_groups(weights, quantised.values.shape[1])


def fake_quantise(W: Tensor, bits: int, group_size: int, symmetric: bool = False, *, refit: bool = False) -> Tensor:
    """Return W (rows, cols) rounded to its grid, float32: the same as dequantise(quantise(W)).

    With `refit` groups that lie on a grid already are given a new one too, which saves looking for them.
    """
    groups = split_groups(W.float(), group_size)
    return join_groups(fake_quantise_groups(groups, bits, symmetric, refit=refit), W.shape[1])


def fake_quantise_groups(groups: Tensor, bits: int, symmetric: bool = False, *, refit: bool = False) -> Tensor:
    """Round float32 groups (rows, groups, width) to their grids."""
    scales, zeros = find_grid(groups, bits, symmetric, refit=refit)
    return _values(groups, scales, zeros, bits, symmetric).sub_(zeros).mul_(scales)


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest level of a grid."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _values(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int, symmetric: bool) -> Tensor:
    return (groups / scales).round_().add_(zeros).clamp_(*limits(bits, symmetric))


def find_grid(
    groups: Tensor, bits: int, symmetric: bool, dim: int = 2, *, refit: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales and zeros of float32 groups whose columns are along `dim`, which is kept with size 1."""
    if groups.numel() == 0:
        empty = groups.sum(dim=dim, keepdim=True)
        return empty + 1, empty
    # On a CPU, torch's `aminmax` takes six times as long as the two calls.
    low, high = groups.amin(dim=dim, keepdim=True).clamp_(max=0), groups.amax(dim=dim, keepdim=True).clamp_(min=0)
    bottom, top = limits(bits, symmetric)
    if symmetric:
        scales = _positive(torch.maximum(-low, high) / (top + 0.5))
        zeros = torch.zeros_like(scales)
    else:
        scales = _positive((high - low) / top)
        zeros = (-low / scales).round()
        # Where the zero point falls half-way between two levels, both ends may round inwards, and the
        # de-quantised group would span less than its grid. A hair off the scale settles the tie.
        short = (high / scales).round() + zeros < top
        scales = torch.where(short, scales * (1 - 1e-6), scales)
    if refit:
        return scales, zeros
    kept = _kept_scales(groups, scales, low, high, bottom, top, dim)
    return kept, zeros if symmetric else torch.where(kept == scales, zeros, (-low / kept).round())


def _kept_scales(groups: Tensor, scales: Tensor, low: Tensor, high: Tensor, bottom: int, top: int, dim: int) -> Tensor:
    """Replace the scale of groups that are already on a grid, which may extend beyond their values.

    The step is taken to be the least magnitude in the group, or, for a symmetric grid, what its
    greatest is a whole number of steps of. Of wide groups, which no accident puts on a grid, a tenth
    of the scale that they would have otherwise is let pass: half precision has rounded them.
    """
    symmetric = bottom < 0
    magnitude = groups.abs()
    greatest = torch.maximum(-low, high)
    step = magnitude.masked_fill_(groups == 0, float("inf")).amin(dim=dim, keepdim=True)
    steps = [greatest / (greatest / step).round_()]
    if symmetric:
        steps += [greatest / top, low / bottom]
    tolerance = scales * (0.1 if groups.shape[dim] >= 16 else 1e-3)
    for step in steps:
        least, most = (low / step).round_(), (high / step).round_()
        fits = (least >= bottom) & (most <= top) if symmetric else most - least <= top
        fits &= (step > 0) & torch.isfinite(step)
        if bool(fits.any()):
            off = (groups - (groups / step).round_().mul_(step)).abs_().amax(dim=dim, keepdim=True)
            scales = torch.where(fits & (off <= tolerance), step, scales)
    return scales


def _positive(scales: Tensor) -> Tensor:
    """Set the scale of groups with only zeros (or numbers too small to divide by) to 1."""
    return torch.where(scales < torch.finfo(scales.dtype).tiny, 1.0, scales)
