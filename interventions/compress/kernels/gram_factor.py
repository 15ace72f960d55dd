"""The triangular factor of a damped Gram matrix: a pure function on tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_DAMPING = 1.0
FEWEST_ULPS = 4
"""Units of rounding of its diagonal element that a pivot must be worth: a smaller one is rounding alone."""


class GramFactor(NamedTuple):
    """An H (cols, cols), damped and factored."""

    R: Tensor
    """(cols, cols) upper triangular, H = R R^T; its inverse is the U of H^-1 = U^T U."""
    dead: Tensor
    """(cols,) bool: columns whose input is always zero; they stand apart from all others."""
    damping: float
    """What was added to the diagonal, as a share of its mean; more than asked for if that was too little."""


def gram_factor(H: Tensor, damping: float) -> GramFactor | None:
    """Factor H (cols, cols) + damping * mean(diag H); H stays as it is.

    A dead column has 1 on the diagonal, and counts in the mean: as in the reference implementations,
    so that nothing differs from them, though it would be better left out where H is small.

    The damping grows tenfold until the sum is positive definite, by more than rounding. Returns None where even
    MOST_DAMPING is not enough: H is then no Gram matrix, or has NaN in it.
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
