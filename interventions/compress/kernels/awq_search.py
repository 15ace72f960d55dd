"""AWQ's two searches on one block: channel scales and clipping thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from interventions.compress.kernels.capture import Call
from interventions.compress.kernels.grid import Grid, fake_quantise, fake_quantise_groups, join_groups, split_groups
from interventions.statistics import STRIP, InputStatistics
from interventions.structure import LinearGroup

CLIP_STEPS = 10
CLIP_STEP = 0.05
"""Thresholds tried: 1, 0.95, ... 0.55 of a group's largest magnitude."""


@dataclass(frozen=True)
class Seen:
    """Inputs and calls recorded from the float block on the calibration text."""

    statistics: dict[str, InputStatistics]
    """By key: the input of each group of linears."""
    scope_calls: dict[str, list[Call]]
    """By key: the calls of the module that contains the group, one per batch."""
    masks: list[Tensor]
    """(batch, tokens) bool each: false for padding."""
    unreached: frozenset[str] = frozenset()
    """Keys of the groups of experts that no token reached: nothing to search for."""

    def has_calls(self, group: LinearGroup) -> bool:
        """Return whether the module that contains the group was called with the hidden states of every batch."""
        calls = self.scope_calls.get(group.key, [])
        return [call.hidden.shape[:2] for call in calls] == [mask.shape for mask in self.masks]


class Search(Protocol):
    """The settings of the searches."""

    @property
    def grid(self) -> int: ...
    @property
    def duo_scaling(self) -> bool: ...
    @property
    def search_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class Choice:
    """The result of a scale search."""

    ratio: float | None
    scales: Tensor | None
    rounding_loss: float
    loss: float


def search_scales(
    group: LinearGroup, grids: Mapping[str, Grid | None], seen: Seen, settings: Search, *, may_scale: bool = True
) -> Choice:
    """Try every exponent of the grid and return the one with the smallest error.

    `grids` has the grid of each linear by name, of at least one; the others keep their values, and with `may_scale`
    there are none.
    """
    statistics = seen.statistics[group.key]
    weights = [linear.weight.clone() for linear in group.linears]
    measure = _ScopeLoss(group, seen, settings) if seen.has_calls(group) else _LinearLoss(weights, statistics)
    own = [grids[linear.name] for linear in group.linears]

    def loss_of(scales: Tensor) -> float:
        rounded = [
            w if grid is None else fake_quantise(w * scales, grid, refit=True).div_(scales)
            for w, grid in zip(weights, own, strict=True)
        ]
        return measure(rounded)

    rounding_loss = loss_of(torch.ones_like(statistics.abs_sum))
    best = Choice(None, None, rounding_loss, rounding_loss)
    if may_scale and group.key not in seen.unreached and group.previous is not None:
        w_mean = mean_relative_magnitude(weights, next(grid.group_size for grid in own if grid is not None))
        for step in range(settings.grid):
            ratio = step / settings.grid
            scales = scales_of(ratio, statistics.mean_abs(), w_mean if settings.duo_scaling else None)
            loss = loss_of(scales)
            if best.scales is None or loss < best.loss:
                best = Choice(ratio, scales, rounding_loss, loss)
    for linear, weight in zip(group.linears, weights, strict=True):
        linear.set_weight_(weight)
    return best


def scales_of(ratio: float, x_mean: Tensor, w_mean: Tensor | None) -> Tensor:
    """Return the channel scales s of an exponent, (d,), balanced around 1.

    `x_mean` is mean |x| by channel, `w_mean` the mean relative |w| by column, None for scales
    from activations alone.
    """
    scales = x_mean.pow(ratio)
    if w_mean is not None:
        scales = scales / (w_mean.pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(torch.isfinite(scales), scales, 1.0)


def mean_relative_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Return by column the mean over rows of |w| / max |w| of its group, (d,); `weights` are (out, d)."""
    rows = torch.cat(list(weights))
    magnitude = split_groups(rows.abs(), group_size)
    relative = magnitude / (magnitude.amax(dim=2, keepdim=True) + 1e-6)
    return join_groups(relative, rows.shape[1]).mean(dim=0)


class _LinearLoss:
    """Mean squared error of the outputs of linear layers, computed exactly from the Gram matrix of their input."""

    def __init__(self, weights: Sequence[Tensor], statistics: InputStatistics) -> None:
        self.weights = weights
        self.gram = statistics.gram
        self.outputs = statistics.count * sum(len(weight) for weight in weights)

    def __call__(self, rounded: Sequence[Tensor]) -> float:
        deltas = (new - weight for new, weight in zip(rounded, self.weights, strict=True))
        return sum(squared_outputs(delta, self.gram) for delta in deltas) / self.outputs


def squared_outputs(W: Tensor, gram: Tensor) -> float:
    """Return |W X|^2 = tr(W G W^T) of W (out, d) with G = X X^T (d, d); reads the upper half of G."""
    total = 0.0
    for low in range(0, gram.shape[0], STRIP):
        high = low + STRIP
        part = W[:, low:high]
        total += float(((part @ gram[low:high, low:high]) * part).sum())
        total += 2 * float(((part @ gram[low:high, high:]) * W[:, high:]).sum())
    return total


class _ScopeLoss:
    """Mean squared error of the output of the attention or MLP that contains a group, without padding."""

    def __init__(self, group: LinearGroup, seen: Seen, settings: Search) -> None:
        assert group.scope is not None
        self.group = group
        self.scope = group.scope
        calls = seen.scope_calls[group.key]
        if group.role == "mlp_in" and all(call.alone for call in calls):  # token by token: a sample of them is enough
            real = [mask.to(call.hidden.device) for call, mask in zip(calls, seen.masks, strict=True)]
            tokens = torch.cat([call.hidden[mask] for call, mask in zip(calls, real, strict=True)])
            tokens = tokens[spread(len(tokens), settings.search_tokens)].unsqueeze(0).to(seen.masks[0].device)
            self.calls = [calls[0].on(tokens).to(tokens.device)]
            self.masks = [torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)]
        else:
            total = sum(int(mask.sum()) for mask in seen.masks)
            share = None if settings.search_tokens is None else -(-settings.search_tokens * len(calls) // total)
            chosen = spread(len(calls), share)
            self.calls = [calls[i].to(seen.masks[i].device) for i in chosen]
            self.masks = [seen.masks[i] for i in chosen]
        self.wanted = [call(self.scope)[mask] for call, mask in zip(self.calls, self.masks, strict=True)]

    def __call__(self, rounded: Sequence[Tensor]) -> float:
        for linear, weight in zip(self.group.linears, rounded, strict=True):
            linear.set_weight_(weight)
        total = sum(
            float((call(self.scope)[mask] - wanted).pow(2).sum())
            for call, mask, wanted in zip(self.calls, self.masks, self.wanted, strict=True)
        )
        return total / sum(wanted.numel() for wanted in self.wanted)


def spread(size: int, limit: int | None) -> list[int]:
    """Return `limit` indices spread evenly over `size`; all if there are fewer or `limit` is None."""
    if limit is None or limit >= size:
        return list(range(size))
    return [i * size // limit for i in range(limit)]


def clip_weight(weight: Tensor, gram: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """Clip each group of a weight (out, in) if that reduces its quantisation error.

    The error of a group is that of its own part of the output, d G d^T with G the group's block
    of the input's Gram matrix (in, in). Returns the clipped weight and the share of groups that
    were clipped.
    """
    groups = split_groups(weight, grid.group_size)  # (out, groups, width)
    G = diagonal_blocks(gram, groups.shape[1], groups.shape[2])  # (groups, width, width)
    greatest = groups.abs().amax(dim=2, keepdim=True)  # (out, groups, 1)
    best = greatest.clone()
    least = torch.full_like(greatest, float("inf"))
    for step in range(CLIP_STEPS):
        limit = greatest * (1 - step * CLIP_STEP)
        delta = fake_quantise_groups(groups.clamp(-limit, limit), grid, refit=True).sub_(groups)
        by_group = delta.transpose(0, 1)  # (groups, out, width)
        error = (torch.bmm(by_group, G) * by_group).sum(dim=2).t().unsqueeze(2)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, limit, best)
    clipped = float((best < greatest).float().mean())
    return join_groups(groups.clamp(-best, best), weight.shape[1]), clipped


def diagonal_blocks(gram: Tensor, groups: int, width: int) -> Tensor:
    """Cut the blocks on the diagonal of gram (d, d), (groups, width, width), zeros beyond d."""
    rest = groups * width - gram.shape[0]
    square = torch.nn.functional.pad(gram, (0, rest, 0, rest)).view(groups, width, groups, width)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
