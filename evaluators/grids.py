"""Tell from the values of a weight whether it lies on a quantisation grid: pure functions on tensors.

A grid is uniform by row and group of columns, with zero among its levels: v = s * j, j whole, and
at most 2**bits levels from the lowest to the highest with zero between them. Scales and zero
points are not known, nor is the size of the groups; both are found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP_SIZES = (32, 64, 128, 256)
"""The usual ones; whole rows are tried too."""
BITS = range(2, 9)
_SAMPLED = 8  # rows that a group size is first tried on
_PROBED = 8  # values of a group that a step is first tried on
_EVIDENCE = 8  # non-zero values by group below which a fit says nothing
_CHUNK = 2**20  # values looked at at once


class Grid(NamedTuple):
    """The grid that a weight lies on."""

    bits: int
    group_size: int
    """Columns that share a scale; the number of columns for whole rows."""
    groups: int


def find_grid(weight: Tensor) -> Grid | None:
    """Return the coarsest grid of 2 to 8 bits that every value of `weight` (out, in) lies on, or None.

    Values may be off by what storing them in the weight's dtype rounds away. A weight with few
    values that are not zero fits grids by chance and is not said to lie on one: at least 8 by group.
    Groups must be columns that stand together, in a usual size; a weight that was quantised in
    another order of its columns is not recognised.
    """
    rows, cols = weight.shape
    sample = weight[torch.linspace(0, rows - 1, min(rows, _SAMPLED)).long().to(weight.device)]
    likely = []
    for size in (*(size for size in GROUP_SIZES if size < cols), cols):
        bits = _bits_of(sample, size, max(BITS))
        if bits is not None:
            likely.append((bits, -size))
    for expected, negative in sorted(likely):
        size = -negative
        found = _bits_of(weight, size, expected) or _bits_of(weight, size, max(BITS))
        if found is not None:
            return Grid(found, size, rows * -(-cols // size))
    return None


def _bits_of(weight: Tensor, size: int, most: int) -> int | None:
    """Return the bits, `most` at most, of the grid that `weight` lies on in groups of `size` columns, or None."""
    groups = pad(weight, (0, -weight.shape[1] % size)).reshape(-1, size)
    groups = groups[(groups != 0).any(dim=1)]
    if not len(groups) or int((groups != 0).sum()) < _EVIDENCE * len(groups):
        return None
    widest = 0
    for part in torch.split(groups, max(1, _CHUNK // size)):
        levels = count_levels(part.float(), 2**most, torch.finfo(weight.dtype).eps)
        if levels is None:
            return None
        widest = max(widest, levels)
    return next(bits for bits in BITS if widest <= 2**bits)


def count_levels(groups: Tensor, most: int, eps: float) -> int | None:
    """Return the levels that the widest group spans, or None if one of them fits none of `most` levels.

    `groups` (n, width) are float32 and none is all zeros; `eps` is that of the dtype they were
    stored in. A group's greatest magnitude is a whole number of its steps, so these are tried from
    1 upwards: on a few values first, and where they fit on all.
    """
    shares = groups / groups.abs().amax(dim=1, keepdim=True)
    probed = shares[:, torch.linspace(0, shares.shape[1] - 1, min(shares.shape[1], _PROBED)).long()]
    steps = torch.arange(1, most, device=groups.device, dtype=groups.dtype)
    hopeful = _fits(probed.unsqueeze(2) * steps, eps).all(dim=1)  # (n, steps)
    fitted = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
    widest = 0
    for column in hopeful.any(dim=0).nonzero().flatten().tolist():
        rows = (hopeful[:, column] & ~fitted).nonzero().flatten()
        numbers = shares[rows] * steps[column]
        # The fewest steps that the ends of the group may stand for, rounded as they are.
        ends = torch.stack([numbers.amax(dim=1), -numbers.amin(dim=1)]).clamp(min=0)
        spans = (ends - _slack(ends, eps)).ceil().sum(dim=0) + 1
        fitting = _fits(numbers, eps).all(dim=1) & (spans <= most)
        fitted[rows[fitting]] = True
        if bool(fitting.any()):
            widest = max(widest, int(spans[fitting].max()))
    return widest if bool(fitted.all()) else None


def _fits(numbers: Tensor, eps: float) -> Tensor:
    """Say which numbers of steps are whole, up to rounding."""
    return (numbers - numbers.round()).abs() <= _slack(numbers, eps)


def _slack(numbers: Tensor, eps: float) -> Tensor:
    """Return how far off rounding may have put numbers of steps.

    A value and the greatest one of its group were each rounded by at most eps / 2 of themselves;
    float32's own rounding on the way comes on top.
    """
    return numbers.abs() * (eps + 4e-7)
