"""Non-inferiority: evidence that a state lost less than a margin on the same samples.

A test for a drop passes a state for want of evidence; this one asks for evidence that a drop of the margin or more did
not happen. Right or wrong answers are judged by the score test for paired proportions of Tango (Statistics in Medicine
17, 1998), other samples by the paired t test (Schuirmann 1987).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

from evaluators.measurement import EvaluationError
from evaluators.significance import is_binary, mean_error, paired

SCORE, T = "paired score", "paired t"


@dataclass(frozen=True)
class NonInferiority:
    """A loss, an upper bound of it, and the samples that a verdict needs."""

    test: str
    n: int
    """Samples."""
    units: int
    """Independent samples, or clusters of them."""
    loss: float
    """Mean loss, in the unit of the samples; negative if the state got better."""
    upper: float
    """One-sided upper confidence bound of the loss; infinite if one unit says nothing."""
    needed: int | None
    """Units with which an unchanged state passes with 80 % power, from the noise seen here; None: any number fails."""


def non_inferiority(
    before: ArrayLike,
    after: ArrayLike,
    *,
    higher_is_better: bool,
    margin: float,
    level: float = 0.05,
    power: float = 0.8,
    clusters: Sequence[Hashable] | None = None,
) -> NonInferiority:
    """Bound how much worse `after` is than `before`, sample by sample, and count the samples that `margin` needs.

    The state is not worse by `margin` or more, at `level`, if the upper bound is below it. Raises EvaluationError for
    samples that cannot be paired or are not finite, and ValueError for a margin that is not above 0.
    """
    if not margin > 0 or not 0 < level < 1:
        raise ValueError(
            f"margin {margin:g} at level {level:g}: expected a margin above 0, and a level between 0 and 1"
        )
    old, new = paired(before, after)
    drops = old - new if higher_is_better else new - old
    if not np.isfinite(drops).all():
        raise EvaluationError("the differences are too large to be tested")
    n, loss = len(drops), math.fsum(drops) / len(drops)
    z = float(stats.norm.isf(level)) + float(stats.norm.isf(1 - power))
    if clusters is None and is_binary(old, new):
        losses, gains = int((drops > 0).sum()), int((drops < 0).sum())
        upper = score_bound(losses, gains, n, level)
        return NonInferiority(SCORE, n, n, loss, upper, _needed_pairs(losses + gains, n, margin, level, power))
    error, units = mean_error(drops, clusters)
    if error is None:
        return NonInferiority(T, n, units, loss, math.inf, None)
    upper = loss + float(stats.t.isf(level, units - 1)) * error
    return NonInferiority(T, n, units, loss, upper, max(2, math.ceil(units * (z * error / margin) ** 2)))


def score_bound(losses: int, gains: int, n: int, level: float) -> float:
    """Return the upper confidence bound of the share of losses minus that of gains, of n pairs."""
    if losses == n:
        return 1.0
    critical = float(stats.norm.isf(level))
    low = (losses - gains) / n
    return float(brentq(lambda share: score(losses, gains, n, share) + critical, low, 1 - 1e-12, xtol=1e-10))


def score(losses: int, gains: int, n: int, share: float) -> float:
    """Return Tango's score statistic for `share`, the difference between the shares of losses and of gains.

    Its variance is that of the most likely shares with this difference.
    """
    a = 2 * n
    b = -losses - gains + (2 * n - losses + gains) * share
    c = -gains * share * (1 - share)
    gained = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * gained + share * (1 - share))
    distance = losses - gains - n * share
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def _needed_pairs(changed: int, n: int, margin: float, level: float, power: float) -> int | None:
    """Return the pairs with which a state whose losses and gains balance passes, if as many pairs change as here."""
    if margin >= 1:
        return 1
    share = changed / n / 2  # of losses, and of gains
    z_level, z_power = float(stats.norm.isf(level)), float(stats.norm.isf(1 - power))

    def short(pairs: float) -> float:
        """Return by how much the bound of such a state exceeds the margin, at the given power."""
        spread = math.sqrt(2 * share / pairs)
        at = score(share * pairs, share * pairs, pairs, margin)  # type: ignore[arg-type]
        scale = margin * pairs / -at if at else math.inf  # standard deviation under the margin
        return z_level * scale / pairs + z_power * spread - margin

    high = 1.0
    while short(high) > 0:
        high *= 2
        if high > 1e12:
            return None
    return math.ceil(brentq(short, high / 2, high)) if high > 1 else 1
