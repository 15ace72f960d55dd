"""Detect quantisation grids from the values of a weight.

A grid of integers is uniform within a group of columns of a row and includes zero: v = s * j with integer j, and at
most 2**bits levels between the lowest and highest j. Scales, zero points and the group size are inferred from the
values. `evaluators.float_grids` finds grids of floating-point numbers.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from evaluators.float_grids import LAYOUTS, Layout, blocks_of, find_scales

GROUP_SIZES = (32, 64, 128, 256)
"""Usual group sizes; whole rows are tried too."""
BITS = range(2, 9)
SCALE_BITS = 16
LEAST_GROUP = 16
"""Columns of the smallest group that packed formats store."""
_SAMPLED = 8  # rows for the first test of a group size
_GLIMPSED = 2  # rows or groups for the first test of a format, of which there are many
_PROBED = 8  # values per group for the first test of a step
_EVIDENCE = 8  # minimum number of non-zero values per group
_CHUNK = 2**20  # values per chunk


class Grid(NamedTuple):
    """Quantisation grid of a weight."""

    bits: int
    group_size: int
    """Columns per scale; all columns for whole rows."""
    groups: int
    """Scales as packed formats store them: where groups do not fill a row, the largest parts of groups that do."""
    floats: Layout | None = None
    """The layout of floating-point numbers; None for integers."""

    @property
    def overhead_bits(self) -> int:
        """Bits of scales and zero points, as in GPTQ's and AWQ's layouts: a zero point has as many as a weight.

        Floating-point numbers have no zero points, but NVFP4 a float32 scale of the whole weight.
        """
        if self.floats is None:
            return (SCALE_BITS + self.bits) * self.groups
        return self.floats.scale_bits * self.groups + 32 * self.floats.two_levels


def find_grid(weight: Tensor) -> Grid | None:
    """Return the grid of fewest bits, 2 to 8, that contains every value of `weight` (out, in), or None.

    Integers are preferred to floating-point numbers of as many bits, and few scales to many. Rounding to the weight's
    dtype is tolerated. At least 8 non-zero values per group are needed, because few values fit a grid by chance. Groups
    must be adjacent columns of a usual size; weights quantised in another column order are not recognised.
    """
    integers = _find_integers(weight)
    floats = _find_floats(weight, 9 if integers is None else integers.bits)
    return integers if floats is None else floats


def _find_floats(weight: Tensor, below: int) -> Grid | None:
    """Return a grid of floating-point numbers of fewer bits, or None."""
    for layout in LAYOUTS:
        if layout.format.bits >= below:
            return None
        first = _sample(weight, _GLIMPSED) if layout.rows == 1 else weight[:_GLIMPSED]
        if find_scales(blocks_of(first, layout), layout) is None:
            continue
        blocks = blocks_of(weight, layout)
        least = _EVIDENCE * int((blocks != 0).any(dim=1).sum())
        evident = least > 0 and int((weight != 0).sum()) >= least
        if evident and find_scales(blocks, layout) is not None:
            cols = weight.shape[1]
            return Grid(layout.format.bits, cols if layout.cols < 0 else layout.cols, len(blocks), layout)
    return None


def _sample(weight: Tensor, count: int = _SAMPLED) -> Tensor:
    rows = len(weight)
    return weight[torch.linspace(0, rows - 1, min(rows, count)).long().to(weight.device)]


def _find_integers(weight: Tensor) -> Grid | None:
    rows, cols = weight.shape
    sample = _sample(weight)
    likely = []
    for size in (*(size for size in GROUP_SIZES if size < cols), cols):
        bits = _bits_of(sample, size, max(BITS))
        if bits is not None:
            likely.append((bits, -size))
    for expected, negative in sorted(likely):
        size = -negative
        found = _bits_of(weight, size, expected) or _bits_of(weight, size, max(BITS))
        if found is not None:
            even = gcd(size, cols)
            return Grid(found, size, rows * -(-cols // (even if even >= LEAST_GROUP else size)))
    return None


def _bits_of(weight: Tensor, size: int, most: int) -> int | None:
    """Return the bits (at most `most`) of the grid with groups of `size` columns, or None without a grid."""
    groups = pad(weight, (0, -weight.shape[1] % size)).reshape(-1, size)
    used = groups.abs().amax(dim=1) > 0
    groups = groups if bool(used.all()) else groups[used]
    if not len(groups) or int(groups.count_nonzero()) < _EVIDENCE * len(groups):
        return None
    widest = 0
    for part in torch.split(groups, max(1, _CHUNK // size)):
        levels = count_levels(part.float(), 2**most, torch.finfo(weight.dtype).eps)
        if levels is None:
            return None
        widest = max(widest, levels)
    return next(bits for bits in BITS if widest <= 2**bits)


def count_levels(groups: Tensor, most: int, eps: float) -> int | None:
    """Return the number of levels of the widest group, or None if a group fits no grid of `most` levels.

    See `fit_steps` for the arguments.
    """
    fitted = fit_steps(groups, most, eps)
    return None if fitted is None else int(fitted.levels.max())


class Fit(NamedTuple):
    """The coarsest grid of each group."""

    steps: Tensor
    """(n,) steps in the largest magnitude."""
    levels: Tensor
    """(n,) levels from the lowest value, or zero, to the highest."""


def fit_steps(groups: Tensor, most: int, eps: float) -> Fit | None:
    """Return the coarsest grids, or None if a group fits no grid of `most` levels.

    `groups` (n, width) are float32 without all-zero groups; `eps` is that of the stored dtype. The largest magnitude of
    a group is a whole number of steps, and so is the least that is not zero. If the latter is one step, the former is
    the ratio of both; otherwise two steps are tried, then three, up to `most`: first on a few values, then on all. Most
    weights are on no grid, as their first groups show.
    """
    magnitudes = groups.abs()
    largest, least = magnitudes.amax(dim=1), least_magnitudes(magnitudes)
    shares, share = groups / largest.unsqueeze(1), least / largest
    probed = shares[:, torch.linspace(0, shares.shape[1] - 1, min(shares.shape[1], _PROBED)).long()]
    counts = torch.arange(1, most, device=groups.device, dtype=groups.dtype)
    if not all(bool(_fit(one * counts.unsqueeze(1), eps).any()) for one in probed[:_GLIMPSED]):
        return None
    ends = torch.stack([shares.amax(dim=1), -shares.amin(dim=1)]).clamp(min=0)
    found = torch.zeros(len(groups), dtype=torch.long, device=groups.device)
    levels = torch.zeros_like(found)
    blur = 1.1 * eps + 1e-6  # relative, of the ratio
    for number in range(1, most):
        lowest, highest = (number * (1 - blur) / share).ceil(), number * (1 + blur) / share
        if bool(((lowest >= most) & (found == 0)).any()):
            return None
        for offset in range(int(2 * most * blur) + 1):
            steps = lowest + offset
            rows = ((found == 0) & (steps <= highest) & (steps < most)).nonzero().flatten()
            rows = rows[_fit(_chosen(probed, rows) * steps[rows, None], eps)]
            rows = rows[_fit(_chosen(shares, rows) * steps[rows, None], eps)]
            # The fewest steps that both ends of the group can represent after rounding.
            reached = ends[:, rows] * steps[rows]
            spans = (reached - _slack(reached, eps)).ceil().sum(dim=0) + 1
            rows, spans = rows[spans <= most], spans[spans <= most]
            found[rows], levels[rows] = steps[rows].long(), spans.long()
        if bool((found > 0).all()):
            return Fit(found, levels)
    return None


def least_magnitudes(magnitudes: Tensor) -> Tensor:
    """Return the least magnitude of each float32 group (n, width) that is not zero; 1 for a group of zeros."""
    most = torch.iinfo(torch.int32).max
    bits = (magnitudes.view(torch.int32) - 1).bitwise_and_(most).amin(dim=1) + 1  # a zero wraps around
    least = bits.view(torch.float32)
    return torch.where(least == 0, 1, least)


def _chosen(groups: Tensor, rows: Tensor) -> Tensor:
    return groups if len(rows) == len(groups) else groups[rows]


def _fit(numbers: Tensor, eps: float) -> Tensor:
    """Return which groups (n, width) are whole numbers, up to rounding."""
    off = numbers.round().sub_(numbers).abs_()
    # Elementwise comparisons are ten times as slow as arithmetic on a CPU.
    return off.sub_(_slack(numbers, eps)).amax(dim=1) <= 0


def _slack(numbers: Tensor, eps: float) -> Tensor:
    """Return the tolerance of numbers of steps.

    A value and the largest one of its group each have a relative error of eps / 2; float32 arithmetic adds its own.
    """
    return numbers.abs() * (eps + 4e-7)
