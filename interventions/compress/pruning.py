"""What the pruning methods share: their settings are checked, their outcome is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from interventions.anatomy import Block, Linear
from interventions.compress.masks import Pattern, check_divides
from interventions.step import Context
from interventions.types import InterventionError

_PATTERN = re.compile(r"(\d+):(\d+)")


class SparsitySettings(Protocol):
    """How much is pruned, and in what pattern."""

    @property
    def sparsity(self) -> float: ...

    @property
    def pattern(self) -> str | None: ...


def check_sparsity(settings: SparsitySettings, method: str, blocks: Sequence[Block]) -> Pattern | None:
    """Return the pattern that the settings ask for, None for none.

    Raises InterventionError, naming the setting, for a sparsity outside [0, 1) and for a pattern
    that cannot be read, that is not of that sparsity, or that does not divide a linear's width.
    """
    if not 0 <= settings.sparsity < 1:
        raise InterventionError(f"{method}: sparsity must be at least 0 and less than 1, not {settings.sparsity}")
    if settings.pattern is None:
        return None
    match = _PATTERN.fullmatch(settings.pattern)
    if match is None:
        raise InterventionError(
            f"{method}: pattern must be like '2:4' (of every 4 weights 2 are kept; quoted in YAML, which else reads a "
            f"time of day), not {settings.pattern!r}"
        )
    pattern = Pattern(int(match[1]), int(match[2]))
    if not 0 < pattern.kept < pattern.of:
        raise InterventionError(
            f"{method}: pattern {settings.pattern!r} must keep at least 1 of every {pattern.of} weights, and not all"
        )
    share = 1 - pattern.kept / pattern.of
    if abs(settings.sparsity - share) > 1e-6:
        raise InterventionError(
            f"{method}: pattern {settings.pattern!r} makes a sparsity of {share:g}, not of {settings.sparsity}: "
            "set sparsity accordingly, or no pattern"
        )
    for linear in (linear for block in blocks for linear in block.linears):
        check_divides(pattern, linear.in_features, f"{linear.name} ({method})")
    return pattern


def prune_(linear: Linear, mask: Tensor) -> dict[str, Any]:
    """Set the weights (out, in) of `mask` to zero in place, and tell what that did."""
    before = linear.weight.clone()
    linear.set_weight_(before.masked_fill(mask, 0))
    return outcome(linear, before, linear.weight)


def outcome(linear: Linear, before: Tensor, after: Tensor) -> dict[str, Any]:
    """Tell what pruning did to one weight."""
    was, zero = before == 0, after == 0
    return {
        "linear": linear.name,
        "sparsity": float(zero.float().mean()),
        "pruned": int((zero & ~was).sum()),
    }


def conclude(outcomes: Sequence[dict[str, Any]], settings: SparsitySettings, context: Context) -> dict[str, Any]:
    """Return a method's details, and tell the run if everything was pruned enough already."""
    if settings.sparsity > 0 and not any(linear["pruned"] for linear in outcomes):
        context.already(f"every linear layer had at least {settings.sparsity:.0%} zeros before")
    return {"linears": list(outcomes)}
