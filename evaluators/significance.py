"""Standard errors, paired tests, Holm's correction and power.

Drops are positive if a state got worse, for either direction of the metric. NaN, empty samples and samples of unequal
number raise EvaluationError, so a failed comparison never counts as equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

from evaluators.measurement import EvaluationError, per_unit, ratio_error

MCNEMAR, T, BOOTSTRAP = "exact McNemar", "paired t", "paired bootstrap"
_TOO_LARGE = "{}: the differences are too large to be tested"
Alternative = Literal["worse", "different"]
Floats = NDArray[np.float64]
_NEGLIGIBLE = 1e-12
"""Probability of numbers of changed answers that are left out of the power."""
_OVERFLOWING = np.errstate(over="ignore", invalid="ignore")  # results are checked for finiteness


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two states."""

    test: str
    n: int
    drop: float
    """Mean loss, in the unit of the samples; negative if the state got better."""
    stderr: float | None
    """Standard error of the drop."""
    p: float


@_OVERFLOWING
def compare(
    before: ArrayLike,
    after: ArrayLike,
    *,
    higher_is_better: bool,
    alternative: Alternative = "worse",
    test: str | None = None,
    clusters: Sequence[Hashable] | None = None,
    generator: np.random.Generator | None = None,
    resamples: int = 9999,
) -> Comparison:
    """Test whether the state `after` is worse than (or different from) `before`, sample by sample.

    The default `test` is exact McNemar for binary outcomes without clusters, otherwise a paired t test
    over samples or clusters. The paired bootstrap needs a `generator` and resamples the centred
    differences. Without any difference, p = 1. If all units drop by the same amount, the error is 0 and
    p is 2^-units, that of a sign test.
    """
    old, new = paired(before, after)
    drops = _finite(old - new if higher_is_better else new - old, "differences")
    if test is None:
        test = MCNEMAR if clusters is None and is_binary(old, new) else T
    units, sizes = _units(drops, clusters), _sizes(drops, clusters)
    error, _ = mean_error(drops, clusters)
    p = _TESTS[test](drops, units, error, alternative, sizes, generator, resamples)
    if not 0 <= p <= 1:
        raise EvaluationError(_TOO_LARGE.format(test))
    return Comparison(test, len(drops), math.fsum(drops) / len(drops), error, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values (Holm 1979), in the given order.

    Rejecting adjusted p-values up to alpha limits the probability of any false alarm to alpha.
    """
    if any(not 0 <= p <= 1 for p in p_values):  # NaN too
        raise EvaluationError(f"not a p-value among {list(p_values)}")
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@_OVERFLOWING
def smallest_drop(
    before: ArrayLike,
    after: ArrayLike,
    *,
    higher_is_better: bool,
    alpha: float,
    power: float = 0.8,
    clusters: Sequence[Hashable] | None = None,
) -> float | None:
    """Return the minimum detectable effect: the smallest true drop that `compare` finds with this `power`.

    The noise is estimated from these samples. For binary outcomes, the rarer direction of change is
    taken as the chance rate in both directions, and the drop adds losses (exact power of McNemar's
    test). Otherwise, the standard error of the differences is used (noncentral t).

    None if no drop is detectable: too few samples, or too few correct answers to lose.
    """
    old, new = paired(before, after)
    drops = old - new if higher_is_better else new - old
    if clusters is None and is_binary(old, new):
        losses, gains = int((drops > 0).sum()), int((drops < 0).sum())
        good = float((old if higher_is_better else 1 - old).mean())
        return _smallest_loss(len(drops), min(losses, gains) / len(drops), good, alpha, power)
    error, units = mean_error(drops, clusters)
    if not error:  # one unit, or no variation: the noise is unknown
        return None
    freedom = units - 1
    critical = stats.t.isf(alpha, freedom)
    excess = _root(lambda shift: float(stats.nct.sf(critical, freedom, shift)) - power, 0.0, 2 * critical + 20)
    return None if excess is None or not math.isfinite(excess * error) else excess * error


def mcnemar_power(n: int, losses: float, gains: float, alpha: float) -> float:
    """Return the power of the one-sided exact test for given shares of losses and gains."""
    ends = stats.binom.ppf(_NEGLIGIBLE, n, losses + gains), stats.binom.isf(_NEGLIGIBLE, n, losses + gains)
    changed = np.arange(int(ends[0]), int(ends[1]) + 1)
    rejects = stats.binom.isf(alpha, changed, 0.5)  # critical number of losses
    share = losses / (losses + gains) if losses + gains else 0.0
    found = stats.binom.pmf(changed, n, losses + gains) @ stats.binom.sf(rejects, changed, share)
    return float(found)


@_OVERFLOWING
def error_over_repeats(
    values: Sequence[float], errors: Sequence[float | None], samples: Sequence[Sequence[float]]
) -> float | None:
    """Return the standard error of the mean of `values`, one per repeat.

    Uses two-way clustering over repeats and samples (Cameron, Gelbach and Miller 2011): the variances
    between repeats and between samples, minus that of their combination. This is valid whether or not
    the repeats share their samples. The error is never below that of the samples alone, because two or
    three repeats may agree by chance.

    `samples` are in the unit of the values. If their numbers differ between repeats, the samples are
    different and the variance between repeats includes all noise.
    """
    repeats = len(values)
    if repeats == 1:
        return errors[0]
    if not all(map(math.isfinite, values)):
        return None
    known = [error for error in errors if error is not None]
    variances = [math.fsum(e * e for e in known) / repeats**2]
    variance = float(np.var(values, ddof=1)) / repeats
    counts = {len(row) for row in samples}
    if len(counts) == 1 and (n := counts.pop()) > 1:
        x = np.asarray(samples, dtype=float)
        residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        item = float(x.mean(0).var(ddof=1)) / n
        variances.append(item)
        variance += item - float((residual**2).sum()) / ((repeats - 1) * (n - 1) * repeats * n)
    error = math.sqrt(max(variance, *variances))
    return error if math.isfinite(error) else None


def _mcnemar(drops: Floats, units: Floats, error: float | None, alternative: Alternative, *_: Any) -> float:
    losses, gains = int((drops > 0).sum()), int((drops < 0).sum())
    if set(np.unique(drops)) - {-1.0, 0.0, 1.0}:
        raise EvaluationError(f"{MCNEMAR}: some outcomes are neither 0 nor 1")
    if losses + gains == 0:
        return 1.0
    side = "greater" if alternative == "worse" else "two-sided"
    return float(stats.binomtest(losses, losses + gains, 0.5, alternative=side).pvalue)


def _t(drops: Floats, units: Floats, error: float | None, alternative: Alternative, *_: Any) -> float:
    mean = math.fsum(drops) / len(drops)
    if len(units) < 2:
        raise EvaluationError(f"{T}: needs at least 2 independent samples")
    if error is None:
        raise EvaluationError(_TOO_LARGE.format(T))
    if error <= 1e-12 * abs(mean) or (error == 0 and mean == 0):
        chance = 0.5 ** len(units)
        if mean == 0 or (mean < 0 and alternative == "worse"):
            return 1.0
        return chance if alternative == "worse" else min(1.0, 2 * chance)
    t = mean / error
    return float(stats.t.sf(t, len(units) - 1) if alternative == "worse" else 2 * stats.t.sf(abs(t), len(units) - 1))


def _bootstrap(
    drops: Floats,
    units: Floats,
    error: float | None,
    alternative: Alternative,
    sizes: Floats,
    generator: np.random.Generator | None,
    resamples: int,
) -> float:
    if generator is None:
        raise EvaluationError(f"{BOOTSTRAP}: needs a generator")
    mean = units.sum() / sizes.sum()
    draws = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=resamples)
    means = draws @ (units - mean * sizes) / (draws @ sizes)
    slack = 1e-12 * max(1.0, abs(mean))  # tolerance for the order of summation
    beyond = means >= mean - slack if alternative == "worse" else np.abs(means) >= abs(mean) - slack
    return float((1 + beyond.sum()) / (1 + resamples))


_TESTS: dict[str, Callable[..., float]] = {MCNEMAR: _mcnemar, T: _t, BOOTSTRAP: _bootstrap}


def _smallest_loss(n: int, churn: float, good: float, alpha: float, power: float) -> float | None:
    """Return the smallest detectable share of extra losses, given the chance rate `churn` in both directions."""
    most = min(good, 1 - churn) - churn
    if most <= 0:
        return None
    return _root(lambda drop: mcnemar_power(n, churn + drop, churn, alpha) - power, 0.0, most)


def _root(function: Callable[[float], float], low: float, high: float) -> float | None:
    """Return the root of an increasing function, or None if it stays negative."""
    if function(high) < 0:
        return None
    return float(brentq(function, low, high, xtol=1e-6)) if function(low) < 0 else low


def mean_error(x: Floats, clusters: Sequence[Hashable] | None) -> tuple[float | None, int]:
    """Return the standard error of the mean of `x`, None for a single unit, and the number of independent units."""
    sizes = _sizes(x, clusters)
    return ratio_error((_units(x, clusters) - x.mean() * sizes).tolist(), len(x)), len(sizes)


def _units(x: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    """Return the sum of `x` in each independent unit."""
    return np.asarray(per_unit(x.tolist(), clusters))


def _sizes(x: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    return _units(np.ones(len(x)), clusters)


def is_binary(*samples: Floats) -> bool:
    """Return whether all samples are 0 or 1."""
    return all(bool(((x == 0) | (x == 1)).all()) for x in samples)


def paired(
    first: ArrayLike, second: ArrayLike, one: str = "samples before", other: str = "samples after"
) -> tuple[Floats, Floats]:
    """Return two lists of samples as arrays; raises EvaluationError if one is broken or they differ in length."""
    a, b = _finite(first, one), _finite(second, other)
    if len(a) != len(b):
        raise EvaluationError(f"{len(a)} {one} and {len(b)} {other} cannot be paired; measure both on the same data")
    return a, b


def _finite(samples: ArrayLike, name: str) -> Floats:
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise EvaluationError(f"{name}: expected a list with at least one number, found shape {x.shape}")
    if not np.isfinite(x).all():
        raise EvaluationError(f"{name}: {int((~np.isfinite(x)).sum())} of {len(x)} are NaN or infinite")
    return x
