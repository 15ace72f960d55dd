"""What a step does to any weights, read from the state that it makes of the base model. Imports torch.

A step that trains or edits adds a difference, one that prunes also has a mask, and one that quantises a grid to round
to. So what a second step makes of the state of a first is known to first order from their single states: it does to
that state what it did to the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from evaluators.grids import BITS, find_grid, fit_steps

_PRUNED = 0.05
"""Share of zeros from which a weight counts as pruned."""
_RESCALED = 0.7
"""Largest relative error at which a state is the base model with other scales of rows and columns."""
_EDGE = 0.499
"""Distance in steps between a rounded weight and the edge of its bucket."""
_WIDER = 1.05
"""Growth of a group's range from which its steps grow too."""

Scales = tuple[Tensor, Tensor]
"""Factors of the rows (out, 1) and columns (1, in) of a weight."""


class Grid(NamedTuple):
    """The grid that a weight (out, in) was rounded to."""

    bits: int
    size: int
    """Columns of a group."""
    steps: Tensor
    """(groups, 1)."""

    @classmethod
    def of(cls, weight: Tensor, likely: Grid | None = None) -> Grid | None:
        """Return the grid of a weight; None without one. One as `likely`, if that fits, is found sooner."""
        grid = None if likely is None else cls._fitted(weight, likely.bits, likely.size)
        if grid is None:
            found = find_grid(weight)
            grid = None if found is None or found.floats else cls._fitted(weight, found.bits, found.group_size)
        return grid

    @classmethod
    def _fitted(cls, weight: Tensor, bits: int, size: int) -> Grid | None:
        groups = _groups(weight, size)
        largest = groups.abs().amax(dim=1, keepdim=True)
        steps = torch.ones_like(largest)
        used = (largest > 0).flatten()
        eps = torch.finfo(weight.dtype).eps
        fitted = fit_steps(groups[used].float(), 2**bits, eps) if bool(used.any()) else None
        if fitted is None:
            return None
        steps[used] = largest[used] / fitted.steps.unsqueeze(1)
        needed = next(bits for bits in BITS if int(fitted.levels.max()) <= 2**bits)
        return cls(needed, size, steps)

    def round(self, base: Tensor, rounded: Tensor, delta: Tensor) -> Tensor:
        """Return what rounding makes of `base + delta`, where it made `rounded` of `base`; all (out, in).

        A weight that was not rounded to the nearest level made up for errors of others, by an unknown amount: it starts
        anywhere in its bucket. So it stays there without a `delta`, and with one leaves as probably as others. Where a
        group's range grows, its steps grow as much.
        """
        before, after, change = (_groups(tensor, self.size) for tensor in (base, rounded, delta))
        codes = (after / self.steps).round()
        nearest = (before - after).abs() <= _EDGE * self.steps
        start = torch.where(nearest, before, after + 2 * _EDGE * _noise(after.shape) * self.steps)
        wider = _range(before + change) / _range(before).clamp(min=1e-12)
        steps = self.steps * torch.where(wider > _WIDER, wider, 1.0)
        low, high = codes.amin(dim=1, keepdim=True), codes.amax(dim=1, keepdim=True)
        found = torch.clamp(((start + change) / steps).round(), low, high) * steps
        return found.reshape(len(rounded), -1)[:, : rounded.shape[1]]


class Mask(NamedTuple):
    """Which values a weight (out, in) has left after pruning."""

    share: float
    """Share of values that are left."""
    as_before: bool
    """Whether these have their values from before."""
    norms: Tensor
    """Norm of each input, (in,) or one for all."""
    left: Tensor
    """Number of values left in each row, (out, 1)."""
    threshold: Tensor
    """The lowest score of so many values of a row, (out, 1)."""

    @classmethod
    def of(cls, base: Tensor, own: Tensor, norms: Tensor) -> Mask | None:
        """Return the mask of a weight that was `base` and is `own`; None if it was not pruned."""
        left = own.count_nonzero(dim=1).unsqueeze(1)
        share = int(left.sum()) / own.numel()
        if 1 - share <= _PRUNED:
            return None
        as_before = bool(((own == 0) | (own == base)).all())
        return cls(share, as_before, norms, left, _lowest(base.float().abs() * norms, left))

    def prune(self, base: Tensor, own: Tensor, delta: Tensor) -> Tensor:
        """Return what pruning makes of `base + delta`, where it made `own` of `base`; all (out, in).

        Each row keeps as many weights as before: those of the largest magnitude times the norm of their input. A weight
        that was chosen otherwise starts at the threshold of its row, so that nothing changes without a `delta`.
        """
        kept = own != 0
        before = base.abs()
        score = before * self.norms
        high, low = torch.maximum(score, self.threshold), torch.minimum(score, self.threshold * 0.999)
        moved = torch.where(kept, high, low) + ((base + delta).abs() - before) * self.norms
        return (torch.where(kept, own, base) + delta) * ((moved >= _lowest(moved, self.left)) & (self.left > 0))


@dataclass(frozen=True)
class Effect:
    """The effect of one step on the weights, from its state."""

    category: str
    base: Mapping[str, Tensor]
    """All parameters of the base model."""
    changed: Mapping[str, Tensor]
    """Those that differ in the state."""
    layers: Mapping[str, bool]
    """Names of the decoder's linear weights, and whether each is stored as (in, out)."""
    norms: Mapping[str, Tensor]
    """Root mean square of the inputs of these weights, where known."""

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grids of the weights that the step rounded."""
        if self.category != "compress":
            return {}
        found: dict[str, Grid] = {}
        for name in self._linears:
            grid = Grid.of(self._turned(name, self.changed[name]), next(reversed(found.values()), None))
            if grid is not None:
                found[name] = grid
        return found

    @cached_property
    def masks(self) -> dict[str, Mask]:
        """The masks of the weights that the step pruned."""
        if self.category != "compress":
            return {}
        found = {}
        for name in self._linears:
            if name not in self.grids:
                base, own = (self._turned(name, tensors[name]) for tensors in (self.base, self.changed))
                found[name] = Mask.of(base, own, self.norms.get(name, torch.ones(1)))
        return {name: mask for name, mask in found.items() if mask is not None}

    @cached_property
    def scales(self) -> dict[str, Scales]:
        """The scales that the step moved between layers, by weight; empty for steps that leave norms alone."""
        norms = [name for name, tensor in self.changed.items() if tensor.dim() == 1]
        if self.category != "compress" or not norms:
            return {}
        found = {name: _fit(self.base[name].float(), self.changed[name].float()) for name in self._linears}
        return {name: scales for name, (scales, error) in found.items() if error <= _RESCALED}

    @property
    def readable(self) -> bool:
        """Whether the effect on other weights is known: not where the step changed the basis or a grid is unknown."""
        if self.category == "merge" or not set(self.changed) <= set(self.base):
            return False
        if any(tensor.shape != self.base[name].shape for name, tensor in self.changed.items()):
            return False
        return self.category != "compress" or bool(self.grids or self.masks or self.scales)

    @cached_property
    def intensity(self) -> float:
        """The norm of the change, relative to the weights that changed."""
        change = sum(float((new.float() - self.base[name].float()).square().sum()) for name, new in self._comparable)
        whole = sum(float(self.base[name].float().square().sum()) for name, _ in self._comparable)
        return float((change / whole) ** 0.5) if whole else 0.0

    def after(self, first: Effect) -> dict[str, Tensor]:
        """Return the weights that differ from the base model after `first` and then this step, to first order."""
        found = dict(first.changed)
        for name, own in self.changed.items():
            found[name] = self._on(first, name) if name in first.changed else own
        return found

    def bits(self, name: str, first: Effect | None = None) -> float:
        """Return the bits of a linear weight after this step, applied to the state of `first`."""
        dense = 8.0 * self.base[name].element_size()
        before = dense if first is None else first.bits(name)
        if name not in self.changed:
            return before
        if name in self.grids:
            return float(self.grids[name].bits)
        if name not in self.masks:
            return dense
        mask = self.masks[name]
        if first is not None and name in first.grids and mask.as_before:
            return before
        return mask.share * dense + 0.5

    @property
    def _linears(self) -> list[str]:
        return [name for name in self.changed if name in self.layers]

    @property
    def _comparable(self) -> list[tuple[str, Tensor]]:
        base = self.base
        return [(name, new) for name, new in self.changed.items() if name in base and new.shape == base[name].shape]

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if self.layers.get(name) else tensor

    def _on(self, first: Effect, name: str) -> Tensor:
        """Return a weight that both steps change, after both."""
        base, own, start = (tensors[name].float() for tensors in (self.base, self.changed, first.changed))
        delta = start - base
        if name in self.scales:
            delta = _scaled(delta, self.scales[name])
        if name in self.grids:
            grid = self.grids[name]
            unrounded = _scaled(base, self.scales[name]) if name in self.scales else base
            found = self._turned(name, grid.round(*(self._turned(name, t) for t in (unrounded, own, delta))))
        elif name in self.masks:
            found = self._turned(name, self.masks[name].prune(*(self._turned(name, t) for t in (base, own, delta))))
        elif name in self.scales:
            found = own + delta
        else:
            change = own - base
            found = start + (_scaled(change, first.scales[name]) if name in first.scales else change)
        return found.to(self.base[name].dtype)


def commutator(base: Mapping[str, Tensor], one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference between two states, relative to the weights where they may differ."""
    difference = whole = 0.0
    for name in one.keys() & other.keys():
        if one[name] is not other[name]:
            difference += float((one[name].float() - other[name].float()).square().sum())
            whole += float(base[name].float().square().sum())
    return float((difference / whole) ** 0.5) if whole else 0.0


def survival(delta: Effect, lossy: Effect, after: Mapping[str, Tensor]) -> float:
    """Return the share of the change by `delta` that is left in the state `after` a lossy step, along the change."""
    kept = whole = 0.0
    for name in (delta.changed.keys() & lossy.changed.keys()) - lossy.scales.keys():
        change = delta.changed[name].float() - delta.base[name].float()
        kept += float(((after[name].float() - lossy.changed[name].float()) * change).sum())
        whole += float(change.square().sum())
    return kept / whole if whole else 1.0


def _lowest(scores: Tensor, count: Tensor) -> Tensor:
    """Return the lowest of the `count` (rows, 1) largest scores of each row."""
    places = (scores.shape[1] - count).clamp(max=scores.shape[1] - 1)
    same, values = int(places[0]), scores.numpy()  # numpy sorts ten times as fast as torch
    ordered = np.partition(values, same, axis=1) if bool((places == same).all()) else np.sort(values, axis=1)
    return torch.from_numpy(ordered).gather(1, places)


@lru_cache(maxsize=8)
def _noise(shape: torch.Size) -> Tensor:
    """Return the same numbers from -0.5 to 0.5 for all weights of a shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5


def _groups(weight: Tensor, size: int) -> Tensor:
    return pad(weight, (0, -weight.shape[1] % size)).reshape(-1, size)


def _range(groups: Tensor) -> Tensor:
    return groups.amax(dim=1, keepdim=True).clamp(min=0) - groups.amin(dim=1, keepdim=True).clamp(max=0)


def _scaled(weight: Tensor, scales: Scales) -> Tensor:
    return weight * scales[0] * scales[1]


def _fit(base: Tensor, new: Tensor, rounds: int = 3) -> tuple[Scales, float]:
    """Fit `new` by `base` with scaled rows and columns; return the scales and the relative error."""
    rows, cols = torch.ones(len(base), 1), torch.ones(1, base.shape[1])
    for _ in range(rounds):
        left = base * rows
        cols = (left * new).sum(0, keepdim=True) / left.square().sum(0, keepdim=True).clamp(min=1e-20)
        left = base * cols
        rows = (left * new).sum(1, keepdim=True) / left.square().sum(1, keepdim=True).clamp(min=1e-20)
    return (rows, cols), float((new - base * rows * cols).norm() / new.norm().clamp(min=1e-20))
