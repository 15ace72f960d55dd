"""Which weights were pruned: read off the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPARSE_SHARE = 0.05
"""A matrix with at least this share of exact zeros was pruned, or may as well have been: a
quantised one of few bits has as many, since zero is a level of its grid."""


def zero_mask(weight: Tensor) -> Tensor | None:
    """Return where a weight is exactly zero, or None if too few are for it to have been pruned."""
    zeros = weight.detach() == 0
    return zeros if float(zeros.float().mean()) >= SPARSE_SHARE else None


def zero_masks(weights: Sequence[Tensor]) -> Tensor | None:
    """Return the masks found in weights (rows, cols) that stand on top of each other, None where there are none."""
    masks = [zero_mask(weight) for weight in weights]
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [torch.zeros_like(w, dtype=torch.bool) if m is None else m for w, m in zip(weights, masks, strict=True)]
    )
