"""HQQ's solver (Badri and Shaji, 2023): grids whose rounding errors are small in an lp norm with p < 1.

Such a norm weighs a few large errors, those of outliers, less than squares do. With levels W_q = round(W / s + z) that
stand for W_r = s (W_q - z), half-quadratic splitting makes |W - W_r|_p^p smaller by turns:

    W_e = shrink(W - W_r)                the errors that stay, by generalised soft thresholding,
    z = mean(W_q - (W - W_e) / s)        the zero point,
    s = <W - W_e, W_q - z> / |W_q - z|^2 the scale, by least squares as well,

while the weight beta of the quadratic term grows. The authors' code leaves s as it is, and stops all groups at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Solved(NamedTuple):
    """Groups of weights on their grids, (rows, groups, width), all float32."""

    values: Tensor
    """Levels, 0 .. 2**bits - 1."""
    scales: Tensor
    """(rows, groups, 1)."""
    zeros: Tensor
    """(rows, groups, 1): where 0 lies among the levels; not whole numbers unless asked for."""

    @property
    def weights(self) -> Tensor:
        """The de-quantised groups."""
        return (self.values - self.zeros) * self.scales


def solve(
    groups: Tensor, bits: int, *, p: float, beta: float, kappa: float, iterations: int, whole_zeros: bool
) -> Solved:
    """Find the grids of float32 groups (rows, groups, width) and round to them.

    With `whole_zeros`, zero points are rounded, so that 0 is a level. A group keeps the best grid of all turns.
    """
    top = 2**bits - 1
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    if whole_zeros:
        low, high = low.clamp(max=0), high.clamp(min=0)
    s = (high - low) / top
    s = torch.where(s < torch.finfo(s.dtype).tiny, 1.0, s)
    z = -low / s
    if whole_zeros:
        z = z.round()
    best = Solved(groups, s, z)  # of which the levels are not read
    least = torch.full_like(s, float("inf"))
    for _ in range(iterations):
        q = (groups / s).add_(z).round_().clamp_(0, top)
        rest = groups - (q - z) * s
        error = rest.abs().pow_(p).mean(dim=2, keepdim=True)
        better = error < least
        if not bool(better.any()):
            break
        least = torch.where(better, error, least)
        best = best._replace(scales=torch.where(better, s, best.scales), zeros=torch.where(better, z, best.zeros))
        wanted = groups - shrink(rest, beta, p)
        z = (q - wanted / s).mean(dim=2, keepdim=True)
        if whole_zeros:
            z = z.round_().clamp_(0, top)
        steps = q - z
        fitted = (wanted * steps).sum(dim=2, keepdim=True) / steps.square().sum(dim=2, keepdim=True)
        s = torch.where(fitted > torch.finfo(s.dtype).tiny, fitted, s)  # false for NaN
        beta *= kappa
    values = (groups / best.scales).add_(best.zeros).round_().clamp_(0, top)
    return best._replace(values=values)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """Return sign(x) max(|x| - |x|^(p-1) / beta, 0), the proximal operator of the lp norm in closed form."""
    magnitude = x.abs()
    return (magnitude - magnitude.pow(p - 1) / beta).clamp_(min=0).mul_(x.sign())
