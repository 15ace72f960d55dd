"""Whether a difference is more than noise: standard errors, paired tests, Holm's correction, power.

Drops are positive where a state got worse, whichever direction the metric has. NaN, no samples and
samples of unequal number raise EvaluationError: nothing that was not compared counts as equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

from evaluators.measurement import EvaluationError, exp, per_unit, ratio_error, total

MCNEMAR, T, BOOTSTRAP = "exact McNemar", "paired t", "paired bootstrap"
_TOO_LARGE = "{}: the differences are too large to be tested"
Alternative = Literal["worse", "different"]
Floats = NDArray[np.float64]
_OVERFLOWING = np.errstate(over="ignore", invalid="ignore")  # what is not finite is looked for at the end


class Estimate(NamedTuple):
    """A value, its standard error (None for a single unit) and its confidence interval."""

    value: float
    stderr: float | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """One state held against another on the same samples."""

    test: str
    n: int
    drop: float
    """Mean loss from before to after, in the unit of the samples; negative where it got better."""
    stderr: float | None
    """Of the drop."""
    p: float


def mean_estimate(
    samples: ArrayLike, *, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Estimate:
    """Estimate the mean of `samples` with Student's t interval.

    With `clusters`, one label a sample, the clusters are the independent units.
    """
    x = _finite(samples, "samples")
    value = total(x) / len(x)
    units = _units(x - value, clusters)
    return _interval(value, ratio_error(units, len(x)), len(units), len(x), confidence)


def proportion_estimate(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Estimate a proportion with Wilson's interval, which keeps its width where all or none succeed."""
    if n < 1 or not 0 <= successes <= n:
        raise EvaluationError(f"{successes} successes of {n} are no proportion")
    share = successes / n
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    error = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return Estimate(share, error, float(interval.low), float(interval.high), n)


def perplexity_estimate(nll: ArrayLike, tokens: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Estimate exp(sum(nll) / sum(tokens)) over windows, by the delta method.

    `nll` is each window's negative log-likelihood in nats, summed over its `tokens`. The interval is
    Student's t on the logarithm, so it holds no negative perplexity.
    """
    x, weights = _pair(nll, tokens, "nll", "tokens")
    if (weights <= 0).any():
        raise EvaluationError("perplexity: a window without tokens has no likelihood")
    tokens_scored = math.fsum(weights)
    mean = total(x) / tokens_scored
    log = _interval(mean, ratio_error((x - mean * weights).tolist(), tokens_scored), len(x), len(x), confidence)
    value = exp(mean)
    error = None if log.stderr is None or not math.isfinite(value * log.stderr) else value * log.stderr
    return Estimate(value, error, exp(log.low), exp(log.high), len(x))


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

    Without `test`: exact McNemar where every outcome is 0 or 1 and each sample is a unit, else a
    paired t test over samples or clusters. The paired bootstrap, which needs a `generator`, draws
    from the differences moved to mean 0. States without any difference have p = 1. Where all units
    drop by exactly the same amount, t has no error to divide by: p is then 2^-units, a sign test's.
    """
    old, new = _pair(before, after, "samples before", "samples after")
    drops = _finite(old - new if higher_is_better else new - old, "differences")
    if test is None:
        test = MCNEMAR if clusters is None and _binary(old, new) else T
    units = np.asarray(_units(drops, clusters))
    error = ratio_error((units - drops.mean() * _sizes(drops, clusters)).tolist(), len(drops))
    p = _TESTS[test](drops, units, error, alternative, _sizes(drops, clusters), generator, resamples)
    if not 0 <= p <= 1:
        raise EvaluationError(_TOO_LARGE.format(test))
    return Comparison(test, len(drops), math.fsum(drops) / len(drops), error, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given.

    Rejecting where an adjusted p-value is at most alpha keeps the chance of any false alarm at alpha.
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
    """Return the smallest true drop that `compare` finds with chance `power` at level `alpha`.

    The noise is that of these samples. 0 or 1: as many answers change each way by chance as did in
    the rarer direction, and the drop adds losses to them (exact power of McNemar's test). Else: the
    standard error of the differences (noncentral t).

    None where no drop is found so surely: too few samples, or too few right answers to lose.
    """
    old, new = _pair(before, after, "samples before", "samples after")
    drops = old - new if higher_is_better else new - old
    if clusters is None and _binary(old, new):
        losses, gains = int((drops > 0).sum()), int((drops < 0).sum())
        good = float((old if higher_is_better else 1 - old).mean())
        return _smallest_loss(len(drops), min(losses, gains) / len(drops), good, alpha, power)
    sizes = _sizes(drops, clusters)
    error = ratio_error((np.asarray(_units(drops, clusters)) - drops.mean() * sizes).tolist(), len(drops))
    if not error:  # one unit, or no two that differ: what the noise is cannot be told
        return None
    freedom = len(sizes) - 1
    critical = stats.t.isf(alpha, freedom)
    excess = _root(lambda shift: float(stats.nct.sf(critical, freedom, shift)) - power, 0.0, 2 * critical + 20)
    return None if excess is None or not math.isfinite(excess * error) else excess * error


def mcnemar_power(n: int, losses: float, gains: float, alpha: float) -> float:
    """Return the chance that the one-sided exact test finds a drop, from the shares lost and gained."""
    changed = np.arange(n + 1)
    rejects = stats.binom.isf(alpha, changed, 0.5)  # more losses than this are significant
    share = losses / (losses + gains) if losses + gains else 0.0
    found = stats.binom.pmf(changed, n, losses + gains) @ stats.binom.sf(rejects, changed, share)
    return float(found)


@_OVERFLOWING
def error_over_repeats(
    values: Sequence[float], errors: Sequence[float | None], samples: Sequence[Sequence[float]]
) -> float | None:
    """Return the standard error of the mean of `values`, one of each repeat.

    Repeats and samples both vary: the variances between repeats and between samples are added and
    that of their combination, which is in both, taken off (two-way clustering; Cameron, Gelbach and
    Miller 2011). So it is right whether the repeats ask the same questions or others. It is never
    less than what the samples alone would give, as two or three repeats may agree by chance.

    `samples` are in the unit of the values; where repeats differ in their number they are other
    samples, and the variance between repeats holds all of it.
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
        raise EvaluationError(f"{T}: a single unit cannot be tested; measure at least 2")
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
        raise EvaluationError(f"{BOOTSTRAP}: pass a generator, so that the result can be repeated")
    mean = units.sum() / sizes.sum()
    draws = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=resamples)
    means = draws @ (units - mean * sizes) / (draws @ sizes)
    slack = 1e-12 * max(1.0, abs(mean))  # sums of the same numbers in another order are equal
    beyond = means >= mean - slack if alternative == "worse" else np.abs(means) >= abs(mean) - slack
    return float((1 + beyond.sum()) / (1 + resamples))


_TESTS: dict[str, Callable[..., float]] = {MCNEMAR: _mcnemar, T: _t, BOOTSTRAP: _bootstrap}


def _smallest_loss(n: int, churn: float, good: float, alpha: float, power: float) -> float | None:
    """Return the extra share of losses that McNemar's test finds, beside `churn` each way."""
    most = min(good, 1 - churn) - churn
    if most <= 0:
        return None
    return _root(lambda drop: mcnemar_power(n, churn + drop, churn, alpha) - power, 0.0, most)


def _root(function: Callable[[float], float], low: float, high: float) -> float | None:
    """Return where a growing function crosses 0, or None if it stays below."""
    if function(high) < 0:
        return None
    return float(brentq(function, low, high, xtol=1e-6)) if function(low) < 0 else low


def _interval(value: float, error: float | None, units: int, n: int, confidence: float) -> Estimate:
    if error is None:
        return Estimate(value, None, -math.inf, math.inf, n)
    reach = error * float(stats.t.isf((1 - confidence) / 2, units - 1))
    return Estimate(value, error, value - reach, value + reach, n)


def _units(x: Floats, clusters: Sequence[Hashable] | None) -> list[float]:
    """Return the sum of `x` over each independent unit."""
    return per_unit(x.tolist(), clusters)


def _sizes(x: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    return np.asarray(_units(np.ones(len(x)), clusters))


def _binary(*samples: Floats) -> bool:
    return all(bool(((x == 0) | (x == 1)).all()) for x in samples)


def _pair(first: ArrayLike, second: ArrayLike, one: str, other: str) -> tuple[Floats, Floats]:
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
