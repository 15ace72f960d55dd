"""Find pruned weights by their zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPARSE_SHARE = 0.05
"""A matrix with at least this share of exact zeros counts as pruned. Quantisation to few bits makes as many,
because zero is a level of its grid."""


def zero_mask(weight: Tensor) -> Tensor | None:
    """Return the mask of exact zeros of a weight, or None if there are too few for a pruned one."""
    zeros = weight.detach() == 0
    return zeros if float(zeros.float().mean()) >= SPARSE_SHARE else None


def zero_masks(weights: Sequence[Tensor]) -> Tensor | None:
    """Return the masks of weights (rows, cols), concatenated along rows; None if no weight is pruned."""
    masks = [zero_mask(weight) for weight in weights]
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [torch.zeros_like(w, dtype=torch.bool) if m is None else m for w, m in zip(weights, masks, strict=True)]
    )
