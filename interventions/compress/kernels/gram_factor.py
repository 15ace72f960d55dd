"""Factor a damped Gram matrix into triangular matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_DAMPING = 1.0
FEWEST_ULPS = 4
"""Smallest valid pivot, in units of rounding of its diagonal element."""


class GramFactor(NamedTuple):
    """The factor of a damped Gram matrix H (cols, cols)."""

    R: Tensor
    """(cols, cols) upper triangular, H = R R^T; its inverse is the U of H^-1 = U^T U."""
    dead: Tensor
    """(cols,) bool: columns whose input is always zero."""
    damping: float
    """Damping used, as a share of the mean diagonal; larger than requested if that was too small."""


def gram_factor(H: Tensor, damping: float) -> GramFactor | None:
    """Factor H (cols, cols) + damping * mean(diag H) without changing H.

    Dead columns have 1 on the diagonal and count in the mean, as in the reference implementations.

    The damping grows tenfold until the sum is positive definite by more than rounding. Returns None if even
    MOST_DAMPING is not enough: H is not a Gram matrix or has NaN.
    """
    found = gram_factors(H.unsqueeze(0), damping)
    return None if found is None else GramFactor(found.R[0], found.dead[0], found.damping[0])


class GramFactors(NamedTuple):
    """The factors of damped Gram matrices (count, cols, cols), like those of `GramFactor`."""

    R: Tensor
    dead: Tensor
    damping: list[float]


def gram_factors(H: Tensor, damping: float) -> GramFactors | None:
    """Factor every H (count, cols, cols) like `gram_factor`; None if one of them cannot be."""
    dead = H.diagonal(dim1=1, dim2=2) == 0
    work = H.flip(1, 2)  # its lower factor, reversed, is the upper one
    diagonal = work.diagonal(dim1=1, dim2=2)
    diagonal[dead.flip(1)] = 1
    mean = diagonal.mean(dim=1, keepdim=True)
    bare = diagonal.clone()
    rounding = FEWEST_ULPS * torch.finfo(work.dtype).eps
    used = [damping] * len(H)
    while True:
        torch.add(bare, torch.tensor(used, dtype=H.dtype, device=H.device).unsqueeze(1) * mean, out=diagonal)
        L, info = torch.linalg.cholesky_ex(work)
        positive = (L.diagonal(dim1=1, dim2=2).square() > rounding * diagonal).all(dim=1)  # false for NaN
        failed = ((info != 0) | ~positive).nonzero().flatten().tolist()
        if not failed:
            return GramFactors(L.flip(1, 2), dead, used)
        for index in failed:
            if used[index] >= MOST_DAMPING:
                return None
            used[index] = min(MOST_DAMPING, max(10 * used[index], 1e-3))
