"""Integer grids: evenly spaced levels.

A group has 2**bits levels, zero always among them. Asymmetric grids span the group's least to its greatest value and
zero. (For a group of one sign AWQ's reference implementations leave zero out of the span but cannot move the zero point
beyond the grid, which cuts off such weights.) Symmetric grids have 2**(b-1) levels below zero and one less above; as in
GPTQ's reference implementation the greatest magnitude lies half a step beyond the upper end, so that it moves by half a
step like any other.

Scales are rounded to what is stored, and zero points found with the rounded ones. As in compressed-tensors, a weight
that lies beyond the last level by that rounding becomes the last level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interventions.compress.kernels.grid import Grid, Scaling, positive, stored_scales


@dataclass(frozen=True)
class Integers(Grid):
    """Whole numbers; a group that lies on such a grid stays there, as far as it can be told."""

    symmetric: bool = False
    weights: torch.dtype = torch.float32
    """The dtype that the weights are stored in."""
    scales: torch.dtype = torch.float32
    """The dtype that scales are stored in."""

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest level."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def scaling(self, groups: Tensor, largest: Tensor | None = None, *, refit: bool = False) -> Scaling:
        """See `Grid`."""
        # On a CPU, torch's `aminmax` takes six times as long as the two calls.
        low, high = groups.amin(dim=2, keepdim=True).clamp_(max=0), groups.amax(dim=2, keepdim=True).clamp_(min=0)
        bottom, top = self.limits
        span, levels = (torch.maximum(-low, high), top + 0.5) if self.symmetric else (high - low, top)
        scales = stored_scales(positive(span / levels), self.scales)
        eps = max(1e-6, torch.finfo(self.scales).eps / 2)
        if not self.symmetric and top * eps < 1 / 8:
            # Where the zero point falls half-way between two levels, as in every group that was clipped, both ends may
            # round inwards, and the de-quantised group would span less than its grid. A hair off the scale settles it.
            short = (high / scales).round() + (-low / scales).round() < top
            scales = torch.where(short, stored_scales(scales * (1 - eps), self.scales), scales)
        if not refit:
            scales = self._kept(groups, scales, low, high)
        if self.symmetric:
            return Scaling(scales, bottom, top)
        zeros = (-low / scales).round_().clamp_(max=top)
        return Scaling(scales, -zeros, top - zeros)

    def round_(self, numbers: Tensor, least: Tensor | float, greatest: Tensor | float) -> Tensor:
        """See `Grid`."""
        return torch.clamp(numbers.round_().add_(0.0), least, greatest, out=numbers)  # type: ignore[arg-type]

    def _kept(self, groups: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Replace the scale of groups that are already on a grid, which may extend beyond their values.

        The step is taken to be the least magnitude in the group, or, for a symmetric grid, what its
        greatest is a whole number of steps of. Of wide groups, which no accident puts on a grid, a tenth
        of the scale that they would have otherwise is let pass: half precision has rounded them.
        """
        bottom, top = self.limits
        magnitude = groups.abs()
        greatest = torch.maximum(-low, high)
        step = magnitude.masked_fill_(groups == 0, float("inf")).amin(dim=2, keepdim=True)
        steps = [greatest / (greatest / step).round_()]
        if self.symmetric:
            steps += [greatest / top, low / bottom]
        tolerance = scales * (0.1 if groups.shape[2] >= 16 else 1e-3)
        for step in steps:
            step = self._as_stored(step)
            least, most = (low / step).round_(), (high / step).round_()
            fits = (least >= bottom) & (most <= top) if self.symmetric else most - least <= top
            fits &= (step > 0) & torch.isfinite(step)
            if bool(fits.any()):
                off = (groups - (groups / step).round_().mul_(step)).abs_().amax(dim=2, keepdim=True)
                scales = torch.where(fits & (off <= tolerance), step, scales)
        return scales

    def _as_stored(self, step: Tensor) -> Tensor:
        """Return a step as a number of the scales' dtype, if the rounding of the weights is why it is not one."""
        stored = step.to(self.scales).float()
        return torch.where((stored - step).abs() <= 2 * torch.finfo(self.weights).eps * step, stored, step)
