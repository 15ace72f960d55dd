"""Grids of floating-point numbers: FP8, and the block formats MXFP4, MXFP6, MXFP8 and NVFP4.

The scale maps the greatest magnitude of a group to the greatest number. It is a number of the weights' dtype (FP8), a
power of two (MX: OCP Microscaling Formats, v1.0), or an FP8 number over one number of the whole matrix (NVFP4). As in
compressed-tensors, a greatest magnitude that would round to the next power of two counts as that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from interventions.compress.kernels.grid import Grid, Scaling, positive, stored_scales
from interventions.floats import E2M1, E4M3, FloatFormat, power_of_two

_LEAST_SCALE = 0.125
"""The scale of NVFP4 groups that are too small for one."""


@dataclass(frozen=True)
class Floats(Grid):
    """Floating-point numbers."""

    format: FloatFormat = E4M3
    kind: Literal["number", "power", "two-level"] = "number"
    """What a scale is: a number of the weights' dtype, a power of two, or an FP8 number over one of the matrix."""
    rows: int = 1
    """Rows that share the scale of a group; -1: all."""
    weights: torch.dtype = torch.float32
    """The dtype that the weights are stored in."""

    @property
    def rows_apart(self) -> bool:
        """See `Grid`."""
        return self.rows == 1

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        return -self.format.greatest, self.format.greatest

    def scaling(self, groups: Tensor, largest: Tensor | None = None, *, refit: bool = False) -> Scaling:
        """See `Grid`; the scale that is found again for rounded weights is the same."""
        magnitudes = torch.maximum(-groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True))
        if self.rows != 1:
            magnitudes = _shared(magnitudes, self.rows)
        greatest = self.format.greatest
        if self.kind == "number":
            scales = stored_scales(positive(magnitudes / greatest), self.weights)
        elif self.kind == "power":
            # In compressed-tensors only FP6 numbers round up by their own mantissa.
            powers = power_of_two(magnitudes, 3 if self.bits == 6 else 1)
            scales = positive(powers / 2.0 ** floor(log2(greatest)))
        else:
            largest = magnitudes.amax() if largest is None else largest
            scales = self.two_levels(magnitudes, two_level_whole(largest, self.weights))
        return Scaling(scales, *self.limits)

    def two_levels(self, magnitudes: Tensor, whole: Tensor) -> Tensor:
        """Return the scales of groups with these greatest magnitudes, as numbers over `whole`."""
        scales = E4M3.round(whole * (magnitudes / self.format.greatest).to(self.weights).float())
        return torch.where(scales == 0, _LEAST_SCALE, scales) / whole

    def round_(self, numbers: Tensor, least: Tensor | float, greatest: Tensor | float) -> Tensor:
        """See `Grid`."""
        return self.format.round_(numbers.clamp_(*self.limits)).add_(0.0)


def two_level_whole(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what NVFP4's scales are numbers of, from the greatest magnitude of a matrix of a dtype."""
    share = stored_scales(1 / largest.clamp(min=torch.finfo(torch.float32).tiny), dtype)
    whole = stored_scales(E4M3.greatest * E2M1.greatest * share, dtype)
    return torch.where(whole.isinf(), 1.0, whole)


def _shared(magnitudes: Tensor, rows: int) -> Tensor:
    """Return the greatest of the magnitudes (rows, groups, 1) of `rows` neighbouring rows, for each of them."""
    count = len(magnitudes)
    size = count if rows < 0 else rows
    blocks = pad(magnitudes, (0, 0, 0, 0, 0, -count % size)).view(-1, size, *magnitudes.shape[1:])
    return blocks.amax(dim=1).repeat_interleave(size, dim=0)[:count]
