"""Recover scales and whole numbers of steps from the values of a de-quantised weight.

`evaluators.grids.find_grid` tells bits and group size; here the values v = s * j of each group are split into a
scale s and integers j so that s * j, rounded to the weight's dtype, gives back the very values. Groups are
neighbouring columns: a quantiser that rounds the columns in order of their activations, but keeps such
groups, needs nothing else; one that also groups them in that order is not recognised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from evaluators.grids import fit_steps

_CHUNK = 2**20  # values per chunk
_BLURRED = 2  # steps that the largest value of a group may be off
_NEIGHBOURS = 2  # float32 numbers on either side of the middle of an interval that are tried


class Recovered(NamedTuple):
    """The grids of a weight."""

    scales: Tensor
    """(rows, groups) float32, positive; a 16-bit number where one gives the same values; 1 for a group of zeros."""
    low: int
    """The lowest number of steps in any group, at most 0."""
    high: int
    """The highest, at least 0."""


def recover(weight: Tensor, bits: int, group_size: int) -> Recovered | None:
    """Return the scales of a weight (out, in) in groups of `group_size` columns, or None if it has no such grid."""
    rows, cols = weight.shape
    groups = pad(weight.detach(), (0, -cols % group_size)).reshape(-1, group_size)
    scales, low, high = [], 0, 0
    for part in torch.split(groups, max(1, _CHUNK // group_size)):
        found = _scales(part, bits)
        if found is None:
            return None
        numbers = steps(part, found, group_size)
        low, high = min(low, int(numbers.min())), max(high, int(numbers.max()))
        scales.append(found)
    return Recovered(torch.cat(scales).reshape(rows, -1), low, high)


def steps(weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return how many steps each value is from zero, (rows, cols) int16, for scales (rows, groups)."""
    scales = spread(scales, group_size, weight.shape[1])
    numbers = (weight.float() / scales).round_()
    if weight.dtype != torch.float32:  # A product that was rounded to a power of two may have come from farther above.
        above = numbers + weight.sign().float()
        missed = ((numbers * scales).to(weight.dtype) != weight) & ((above * scales).to(weight.dtype) == weight)
        numbers = torch.where(missed, above, numbers)
    return numbers.to(torch.int16)


def zero_points(numbers: Tensor, group_size: int, bits: int) -> Tensor:
    """Return the levels of zero of groups of steps, (rows, groups) int16: the middle of 2**bits levels where it can be.

    Half precision blurs large numbers of steps, so that a group may seem to have one level more than there are: then
    the larger end is cut off.
    """
    middle, most = 2 ** (bits - 1), 2**bits - 1
    rows, cols = numbers.shape
    groups = pad(numbers, (0, -cols % group_size)).reshape(rows, -1, group_size)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    wide = high - low > most
    low, high = (
        torch.where(wide & (-low > high), high - most, low),
        torch.where(wide & (-low <= high), most + low, high),
    )
    return torch.full_like(low, middle).clamp(-low, most - high)


def multiply(numbers: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Undo `steps`: (rows, cols) float32."""
    return numbers.float() * spread(scales, group_size, numbers.shape[1])


def spread(by_group: Tensor, group_size: int, cols: int) -> Tensor:
    """Repeat what each group has (rows, groups) for its columns: (rows, cols)."""
    return by_group.repeat_interleave(group_size, dim=1)[:, :cols]


def _scales(groups: Tensor, bits: int) -> Tensor | None:
    """Return the scales (n, 1) of groups (n, width), or None if one fits no grid."""
    scales = torch.ones(len(groups), 1, device=groups.device)
    filled = (groups != 0).any(dim=1)
    values = groups[filled]
    if not len(values):
        return scales
    eps = torch.finfo(groups.dtype).eps
    fit = fit_steps(values.float(), 2**bits, eps)
    if fit is None:
        return None
    magnitude = values.to(torch.float64 if groups.dtype == torch.float32 else torch.float32).abs()
    scale = magnitude.amax(dim=1, keepdim=True) / fit.steps.unsqueeze(1)
    numbers = (magnitude / scale).round_()
    if eps * 2**bits > 1e-3:  # That scale has the rounding error of one value; least squares that of all.
        for _ in range(3):
            scale = (magnitude * numbers).sum(dim=1, keepdim=True) / numbers.square().sum(dim=1, keepdim=True)
            numbers = (magnitude / scale).round_()
    # A scale gives back a value if it is within half a unit in the last place of it, divided by its steps;
    # below a power of two, these units are half as large.
    mantissa, exponent = torch.frexp(magnitude)
    half = torch.ldexp(torch.full_like(magnitude, eps / 4), exponent)
    # Where a value has so many steps that rounding blurs their number, it says nothing of the scale.
    used = (numbers > 0) & ((magnitude / scale - numbers).abs() < 0.5 - numbers * eps / 8)
    least = (magnitude - half * torch.where(mantissa == 0.5, 0.5, 1.0)) / numbers
    most = (magnitude + half) / numbers
    least = least.masked_fill_(~used, 0).amax(dim=1, keepdim=True)
    most = most.masked_fill_(~used, float("inf")).amin(dim=1, keepdim=True)
    scales[filled] = _choose(values, scale, least, most, fit.steps, bits)
    return scales


def _choose(values: Tensor, scale: Tensor, least: Tensor, most: Tensor, most_steps: Tensor, bits: int) -> Tensor:
    """Return the first float32 number between `least` and `most` that gives back all values of its group.

    16-bit numbers are tried first, because packed formats store such scales: those of the model's dtype, else float16.
    Where values of half precision have so many steps that `most_steps`, those of the largest one, may be a few off, the
    numbers of that dtype around it are tried too. Without any, it is `scale`.
    """
    middle = torch.where(least <= most, (least + most) / 2, scale)
    single = middle.float()
    sixteen = [middle.bfloat16().float(), middle.half().float()]
    first, second = sixteen if values.dtype == torch.bfloat16 else reversed(sixteen)
    candidates = [second, single]
    up = down = single
    for _ in range(_NEIGHBOURS):
        up = torch.nextafter(up, torch.full_like(up, float("inf")))
        down = torch.nextafter(down, torch.zeros_like(down))
        candidates += [up, down]
    chosen = single.clone()
    open_ = torch.ones(len(values), dtype=torch.bool, device=values.device)
    _try(values, first, open_ & ((least <= first) & (first <= most)).squeeze(1), chosen, open_, bits)
    if torch.finfo(values.dtype).eps * 2**bits > 0.25 and bool(open_.any()):
        largest = values.float().abs().amax(dim=1, keepdim=True)
        for count in range(-_BLURRED, _BLURRED + 1):
            candidate = (largest / (most_steps.unsqueeze(1) + count).clamp(min=1)).to(values.dtype)
            for off in (0, -1, 1):
                near = (candidate.view(torch.int16) + off).view(values.dtype)
                _try(values, near.float(), open_, chosen, open_, bits)
    for candidate in candidates:
        _try(values, candidate, open_ & ((least <= candidate) & (candidate <= most)).squeeze(1), chosen, open_, bits)
    return chosen


def _try(values: Tensor, candidate: Tensor, where: Tensor, chosen: Tensor, open_: Tensor, bits: int) -> None:
    """Choose a scale for the groups `where` it gives back all values."""
    hopeful = (where & (candidate > 0).squeeze(1)).nonzero().flatten()
    if not len(hopeful):
        return
    part, tried = values[hopeful], candidate[hopeful]
    width = part.shape[1]
    numbers = steps(part, tried, width)
    zeros = zero_points(numbers, width, bits)
    numbers = numbers.clamp(-zeros, 2**bits - 1 - zeros)  # as stored
    same = (multiply(numbers, tried, width).to(part.dtype) == part).all(dim=1)
    chosen[hopeful[same]] = tried[same]
    open_[hopeful[same]] = False
