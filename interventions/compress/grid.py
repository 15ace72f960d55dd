"""Integer grids for weight matrices: pure functions on tensors.

A row of W (rows, cols) is cut into groups of `group_size` columns; -1, or more columns than
there are, makes the row one group, and the last group of an odd width is shorter. A group has
2**bits evenly spaced levels, zero always among them: `W ~ (values - zeros) * scales`.

Asymmetric grids span the group's least to its greatest value and zero. (For a group of one sign
the reference implementations leave zero out of the span but cannot move the zero point beyond
the grid, which cuts off such weights.) Symmetric grids span plus and minus the greatest magnitude.
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
    """(rows, groups) float32, whole numbers: the value that stands for 0."""
    group_size: int


def width_of_group(cols: int, group_size: int) -> int:
    """Return the columns of a full group: `group_size`, or all where that is -1 or too wide."""
    return cols if group_size < 0 or group_size > cols else group_size


def split_groups(W: Tensor, group_size: int) -> Tensor:
    """View W (rows, cols) as (rows, groups, group width), the last group filled up with zeros."""
    rows, cols = W.shape
    width = max(1, width_of_group(cols, group_size))
    groups = -(-cols // width)
    return pad(W, (0, groups * width - cols)).reshape(rows, groups, width)


def join_groups(groups: Tensor, cols: int) -> Tensor:
    """Undo `split_groups`: (rows, groups, width) to (rows, cols)."""
    return groups.reshape(groups.shape[0], groups.shape[1] * groups.shape[2])[:, :cols]


def quantise(W: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Quantised:
    """Put W (rows, cols) on the grid of its own groups, each weight at the nearest level."""
    groups = split_groups(W.float(), group_size)
    scales, zeros = _grid_of(groups, bits, symmetric)
    values = _values(groups, scales, zeros, bits, symmetric)
    return Quantised(join_groups(values, W.shape[1]).to(torch.int16), scales.squeeze(2), zeros.squeeze(2), group_size)


def dequantise(quantised: Quantised) -> Tensor:
    """Return the matrix that `quantised` stands for, (rows, cols) float32."""
    groups = split_groups(quantised.values.float(), quantised.group_size)
    weights = (groups - quantised.zeros.unsqueeze(2)) * quantised.scales.unsqueeze(2)
    return join_groups(weights, quantised.values.shape[1])


def fake_quantise(W: Tensor, bits: int, group_size: int, symmetric: bool = False) -> Tensor:
    """Return W (rows, cols) rounded to its grid, float32: dequantise(quantise(W)) without the detour."""
    return join_groups(fake_quantise_groups(split_groups(W.float(), group_size), bits, symmetric), W.shape[1])


def fake_quantise_groups(groups: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Round float32 groups (rows, groups, width) to their grids."""
    scales, zeros = _grid_of(groups, bits, symmetric)
    return _values(groups, scales, zeros, bits, symmetric).sub_(zeros).mul_(scales)


def _limits(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _values(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int, symmetric: bool) -> Tensor:
    return (groups / scales).round_().add_(zeros).clamp_(*_limits(bits, symmetric))


def _grid_of(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales and zeros, (rows, groups, 1), of groups (rows, groups, width)."""
    if groups.numel() == 0:
        return groups.new_ones(*groups.shape[:2], 1), groups.new_zeros(*groups.shape[:2], 1)
    low, high = groups.aminmax(dim=2, keepdim=True)
    top = _limits(bits, symmetric)[1]
    if symmetric:
        scales = _positive(torch.maximum(-low, high) / top)
        return scales, torch.zeros_like(scales)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _positive((high - low) / top)
    zeros = (-low / scales).round()
    # Where the zero point falls half-way between two levels, both ends may round inwards, and the
    # de-quantised group would span less than its grid. A hair off the scale settles the tie.
    short = (high / scales).round() + zeros < top
    return torch.where(short, scales * (1 - 1e-6), scales), zeros


def _positive(scales: Tensor) -> Tensor:
    """Give groups of nothing but zeros (or of numbers too small to divide by) the scale 1."""
    return torch.where(scales < torch.finfo(scales.dtype).tiny, 1.0, scales)
