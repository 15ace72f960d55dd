"""Non-inferiority: evidence that a state lost less than a margin on the same samples.

A test for a drop passes a state for want of evidence; this one asks for evidence that a drop of the margin or more did
not happen: the upper confidence bound of the loss lies below it. The bound belongs to the tests of `significance`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from evaluators.bounded import chance, upper_bound
from evaluators.significance import Drops, least_units, quantile, t_bound, whole


@dataclass(frozen=True)
class NonInferiority:
    """An upper bound of a loss, and the samples that a verdict needs."""

    upper: float
    """One-sided upper confidence bound of the loss, in the unit of the samples; infinite if nothing is known."""
    needed: int | None
    """Units with which an unchanged state passes with 80 % power, from the noise seen here; None: unknown."""


def non_inferiority(drops: Drops, margin: float, level: float = 0.05, power: float = 0.8) -> NonInferiority:
    """Bound a loss, and count the units that `margin` needs.

    The state is not worse by `margin` or more, at `level`, if the upper bound is below it. Raises ValueError for a
    margin that is not above 0.
    """
    if not margin > 0 or not 0 < level < 1:
        raise ValueError(
            f"margin {margin:g} at level {level:g}: expected a margin above 0, and a level between 0 and 1"
        )
    error, span, units = drops.error, drops.span, len(drops.sums)
    z = quantile(1 - power)
    if span is not None:
        upper = upper_bound(drops.sums, drops.sizes, span, level)
        if error is None:
            return NonInferiority(upper, None)

        def passes(times: float) -> bool:
            """Return whether an unchanged state passes with `times` as many units, in the share `power` of runs."""
            seen = margin - z * error / math.sqrt(times)
            return seen > 0 and chance(-drops.centred, drops.sizes, span, -seen, times=times) <= level

        return NonInferiority(upper, least_units(units, passes))
    if error is None:
        return NonInferiority(math.inf, None)
    ratio = (quantile(level) + z) * error / margin
    return NonInferiority(t_bound(drops, level), whole(max(2, units * ratio * ratio)))
