"""Find the steps of which all values of a group are whole numbers, exactly to the last bit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from evaluators.grids import least_magnitudes

LEVELS = 256
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""The integers with the bits of each dtype."""
_PRECISE = {
    torch.float32: (torch.float64, torch.int64),
    torch.bfloat16: (torch.float32, torch.int32),
    torch.float16: (torch.float32, torch.int32),
}
_ROUNDS = 4
_SLACK = 0.03  # a remainder below this many steps is rounding


class Steps(NamedTuple):
    """Groups as whole numbers of steps."""

    numbers: Tensor
    """(n, width) whole numbers, float32; zero in groups without a step."""
    scales: Tensor
    """(n,) float32; 0 for groups without a step. `numbers * scales`, rounded to the groups' dtype, is the group."""


def find_steps(groups: Tensor) -> Steps:
    """Return the step of each of `groups` (n, width) that spans at most 256 levels, zero among them, if it has one.

    -0.0 counts as 0.
    """
    wide = groups.float()
    least = least_magnitudes(wide.abs())
    if groups.dtype != torch.float32:  # the least magnitude is rounded, too far for a scale
        scales = _refined(groups, least)
        numbers, exact = _numbers(groups, wide, scales)
        return Steps(numbers.masked_fill_(~exact.unsqueeze(1), 0), scales.masked_fill_(~exact, 0))
    numbers, exact = _numbers(groups, wide, least)
    scales, inexact = least, (~exact).nonzero().flatten()
    if len(inexact):
        some = groups[inexact]
        better = _refined(some, least[inexact])
        refined, exact = _numbers(some, some, better)
        numbers[inexact] = refined.masked_fill_(~exact.unsqueeze(1), 0)
        scales[inexact] = better.masked_fill_(~exact, 0)
    return Steps(numbers, scales)


def _numbers(groups: Tensor, wide: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return groups as whole numbers of steps, and which of them are exactly that."""
    column = scales.unsqueeze(1)
    numbers = (wide / column).round_()
    # Elementwise comparisons are ten times as slow as arithmetic on a CPU.
    exact = (numbers * column).to(groups.dtype).float().sub_(wide).abs_().amax(dim=1) == 0
    exact &= numbers.amax(dim=1).clamp_(min=0) - numbers.amin(dim=1).clamp_(max=0) < LEVELS
    return numbers, exact


def _refined(groups: Tensor, least: Tensor) -> Tensor:
    """Return the best scales of groups from their least magnitudes: Euclid's algorithm, a mean, bounds by rounding."""
    eps = torch.finfo(groups.dtype).eps
    wide = groups.abs().float()
    steps = least
    for _ in range(_ROUNDS):
        shares = (wide / steps.unsqueeze(1)).clamp_(max=int(2 * _SLACK / eps))  # farther ones are too uncertain
        rest = (shares - shares.round()).abs_()
        clear = threshold((rest - _SLACK).sub_(shares, alpha=eps), 0, torch.inf)
        margin, place = clear.min(dim=1, keepdim=True)
        found = margin.squeeze(1) < torch.inf
        if not bool(found.any()):
            break
        shorter = steps * rest.gather(1, place).squeeze(1)
        steps = torch.where(found, least / (least / shorter).round_(), steps)
    # Values farther than this may be rounded to a neighbour.
    near = threshold((wide / steps.unsqueeze(1)).round_().neg_(), -0.25 / eps - 0.5, 0)
    steps = (wide * near.clamp(min=-1)).sum(dim=1) / near.sum(dim=1)
    # A scale is right if it rounds to every value: the scales that do so lie between these bounds.
    precise, integers = _PRECISE[groups.dtype]
    counts = (wide / steps.unsqueeze(1)).round_().to(precise)
    bits, half = wide.to(precise).view(integers), int(eps / torch.finfo(precise).eps / 2)
    low = ((bits - half).clamp_(min=0).view(precise) / counts.clamp(min=1)).amax(dim=1)
    high = ((bits + half).view(precise) / counts).amin(dim=1)
    return torch.where(high == torch.inf, 1, (low + high) / 2).float()
