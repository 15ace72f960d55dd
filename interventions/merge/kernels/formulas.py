"""Merge the values of one parameter of several models. Tensors are float32 or wider, and none is written.

The constants for degenerate cases, and the scaling of DARE, are those of mergekit 0.1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

_PARALLEL = 0.9995
"""Cosine above which interpolation on the sphere is that on a line."""
_LEAST_NORM = 1e-8
_LEAST = 1e-6
_LEAST_MAGNITUDE = 1e-7
_LEAST_WEIGHT = 1e-8

Trim = Callable[[Tensor, int], Tensor]
"""Returns a task vector with zeros, given that and the model's number."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Return the weighted sum, or mean (model soups, Wortsman et al., ICML 2022)."""
    found = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        found.add_(tensor, alpha=weight)
    return found.div_(sum(weights)) if normalize else found


def slerp(one: Tensor, other: Tensor, t: float) -> Tensor:
    """Interpolate on the sphere (Shoemake, SIGGRAPH 1985), on a line where both point the same way or against it."""
    norms = [norm if (norm := float(tensor.norm())) > _LEAST_NORM else 1.0 for tensor in (one, other)]
    cosine = (one.flatten() / norms[0]).dot(other.flatten() / norms[1])
    if abs(float(cosine)) > _PARALLEL:
        return (1 - t) * one + t * other
    angle = cosine.acos()
    return ((1 - t) * angle).sin() / angle.sin() * one + (t * angle).sin() / angle.sin() * other


def add_task_vectors(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    trim: Trim,
    *,
    elect: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Add the weighted sum of trimmed task vectors, times `scale`, to the base.

    Task arithmetic (Ilharco et al., ICLR 2023); with `elect`, only entries with the sign of their sum count, as in TIES
    (Yadav et al., NeurIPS 2023). `normalize` divides by the sum of the weights that count.
    """
    deltas = [
        trim(tensor - base, k).mul_(weight) for k, (tensor, weight) in enumerate(zip(tensors, weights, strict=True))
    ]
    counted = elected(deltas) if elect else [torch.ones((), dtype=base.dtype, device=base.device)] * len(deltas)
    total = sum_of(delta * mask for delta, mask in zip(deltas, counted, strict=True))
    if normalize:
        divisor = sum_of((mask * weight).to(base.dtype) for mask, weight in zip(counted, weights, strict=True))
        total /= torch.where(divisor.abs() < _LEAST_WEIGHT, 1, divisor)
    return base + scale * total


def elected(deltas: Sequence[Tensor]) -> list[Tensor]:
    """Return for each task vector where it has the sign of their sum, as a mask; plus where the sum is zero."""
    positive = sum_of(deltas) >= 0
    return [torch.where(positive, delta > 0, delta < 0) for delta in deltas]


def model_stock(base: Tensor, tensors: Sequence[Tensor], rows: bool) -> Tensor:
    """Move from the base towards the mean, by the angle between task vectors (Jang et al., ECCV 2024).

    With `rows`, each row of a matrix has an angle of its own.
    """
    flat = (1, -1) if not rows or base.dim() < 2 else base.shape
    start = base.reshape(flat)
    deltas = [tensor.reshape(flat) - start for tensor in tensors]
    cosines = []
    for one, other in combinations(deltas, 2):
        norms = one.norm(dim=-1, keepdim=True) * other.norm(dim=-1, keepdim=True)
        cosines.append(((one * other).sum(dim=-1, keepdim=True) / norms.clamp(min=_LEAST)).clamp(-1, 1))
    cosine, count = torch.stack(cosines).mean(dim=0), len(tensors)
    divisor = 1 + (count - 1) * cosine
    share = torch.where(divisor.abs() < _LEAST, 0, count * cosine / divisor)
    mean = sum_of(tensor.reshape(flat) for tensor in tensors) / count
    return (share * mean + (1 - share) * start).reshape(base.shape)


def sce(base: Tensor, tensors: Sequence[Tensor], density: float) -> Tensor:
    """Select, calculate, erase (Wan et al., 2024): weights are the mean squares of the selected entries."""
    deltas = torch.stack([tensor - base for tensor in tensors])
    if density < 1:
        deltas *= varied(deltas, density)
    weights = deltas.square().flatten(1).mean(dim=1)
    weights = torch.ones_like(weights) / len(weights) if float(weights.sum()) < _LEAST else weights / weights.sum()
    shaped = weights.reshape(-1, *[1] * base.dim())
    counted = shaped * torch.stack(elected(list(deltas)))
    return base + (deltas * counted).sum(dim=0) / counted.sum(dim=0).clamp(min=_LEAST)


def varied(deltas: Tensor, density: float) -> Tensor:
    """Return a mask of the entries with the largest variance, a share of those that vary at all."""
    variance = deltas.var(dim=0, unbiased=False)
    count = int(torch.count_nonzero(variance) * density)
    mask = torch.zeros_like(variance)
    mask.view(-1)[variance.flatten().topk(count).indices] = 1
    return mask


def largest(delta: Tensor, density: float) -> Tensor:
    """Return a mask of the largest entries of a task vector, at least one.

    Differences of bfloat16 weights have many equal entries at the threshold: this sort chooses those of mergekit.
    """
    count = max(1, int(density * delta.numel()))
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    mask[delta.abs().flatten().argsort(descending=True)[:count]] = True
    return mask.reshape(delta.shape)


def random_mask(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return a mask that keeps each entry with probability `density` (DARE, Yu et al., ICML 2024)."""
    return (torch.rand(delta.shape, generator=generator) < density).to(delta.device)


def masked(delta: Tensor, mask: Tensor, rescale: str, density: float) -> Tensor:
    """Return the entries in the mask: scaled to the former sum of magnitudes, divided by the density, or as is."""
    kept = delta * mask
    if rescale == "density":
        return kept / density
    before, after = delta.abs().sum(), kept.abs().sum()
    if rescale == "none" or before < _LEAST_MAGNITUDE or after < _LEAST_MAGNITUDE:
        return kept
    return kept * (before / after)


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum, as a new tensor."""
    rest = iter(tensors)
    found = next(rest).clone()
    for tensor in rest:
        found += tensor
    return found
