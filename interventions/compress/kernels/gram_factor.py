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
    dead = H.diagonal() == 0
    work = H.flip(0, 1)  # its lower factor, reversed, is the upper one
    diagonal = work.diagonal()
    diagonal[dead.flip(0)] = 1
    mean = diagonal.mean()
    bare = diagonal.clone()
    rounding = FEWEST_ULPS * torch.finfo(work.dtype).eps
    while True:
        torch.add(bare, damping * mean, out=diagonal)
        L, info = torch.linalg.cholesky_ex(work)
        if int(info) == 0 and bool((L.diagonal().square() > rounding * diagonal).all()):  # false for NaN
            return GramFactor(L.flip(0, 1), dead, damping)
        if damping >= MOST_DAMPING:
            return None
        damping = min(MOST_DAMPING, max(10 * damping, 1e-3))
