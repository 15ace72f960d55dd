"""Standard errors, paired tests, Holm's correction and power.

Drops are positive if a state got worse, for either direction of the metric. NaN, empty samples and samples of unequal
number raise EvaluationError, so a failed comparison never counts as equal.

Right or wrong answers are compared by McNemar's exact test, samples in a known range by its extension in `bounded`.
Other samples are compared by the paired t test, and by the same with Hall's correction for skewness (Journal of the
Royal Statistical Society B 54, 1992); the larger p counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.optimize import brentq

from evaluators.bounded import chance
from evaluators.measurement import EvaluationError, per_unit, ratio_error

MCNEMAR, BOUNDED, T = "exact McNemar", "Gaffke's test", "paired t"
_TOO_LARGE = "{}: the differences are too large to be tested"
Alternative = Literal["worse", "different"]
Floats = NDArray[np.float64]
_REACH = 7.5
"""Standard errors around the mean beyond which numbers of changed answers have a probability below 1e-12."""
_ROUNDING = 1e-4
"""A mean change below this share of a metric's range, or else of its samples, may be rounding, and is no change."""
_MOST = 1e12
"""More samples than this are never asked for."""
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


class Drops:
    """Losses of paired samples: `sums` over independent units, and the units' `sizes`."""

    @_OVERFLOWING
    def __init__(
        self,
        before: ArrayLike,
        after: ArrayLike,
        *,
        higher_is_better: bool,
        clusters: Sequence[Hashable] | None = None,
        span: float | None = None,
    ) -> None:
        """Pair samples; `span` is how far one can change, None if unknown; raises EvaluationError."""
        old, new = paired(before, after)
        self.losses = _finite(old - new if higher_is_better else new - old, "differences")
        self.n, self.mean = len(old), math.fsum(self.losses) / len(old)
        self.sums, self.sizes = _units(self.losses, clusters), _sizes(old, clusters)
        self.error = ratio_error((self.sums - self.mean * self.sizes).tolist(), self.n)
        graded = not is_binary(old, new)
        self.binary = not graded and len(self.sums) == self.n
        self.good = float((old if higher_is_better else 1 - old).mean())
        self.span = span if graded else 1.0
        self.rounding = _ROUNDING * (self.span or float(max(np.abs(old).max(), np.abs(new).max())))
        self.test = MCNEMAR if self.binary else T if self.span is None else BOUNDED

    @property
    def centred(self) -> Floats:
        """The sums over units, without the mean loss."""
        return self.sums - self.mean * self.sizes


def compare(
    before: ArrayLike,
    after: ArrayLike,
    *,
    higher_is_better: bool,
    alternative: Alternative = "worse",
    clusters: Sequence[Hashable] | None = None,
    span: float | None = None,
) -> Comparison:
    """Test whether the state `after` is worse than (or different from) `before`, sample by sample.

    Samples of one cluster are one unit. `span` is the furthest that a sample can change; None: unknown. Without any
    difference, p = 1. A t test of units that all drop alike has no error; p is then that of a sign test.
    """
    drops = Drops(before, after, higher_is_better=higher_is_better, clusters=clusters, span=span)
    return compare_drops(drops, alternative)


def compare_drops(drops: Drops, alternative: Alternative = "worse") -> Comparison:
    """Test whether there is a drop (or any difference); see `compare`."""
    p = _p_of(drops, drops.sums)
    if alternative == "different":
        p = min(1.0, 2 * min(p, _p_of(drops, -drops.sums)))
    if not 0 <= p <= 1:
        raise EvaluationError(_TOO_LARGE.format(drops.test))
    return Comparison(drops.test, drops.n, drops.mean, drops.error, p)


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
def smallest_drop(drops: Drops, alpha: float, power: float = 0.8) -> float | None:
    """Return the minimum detectable effect: the smallest true drop that `compare` finds with this `power`.

    The noise is estimated from these samples. For binary outcomes, the rarer direction of change is
    taken as the chance rate in both directions, and the drop adds losses (exact power of McNemar's
    test). Otherwise, the standard error of the differences is used.

    None if no drop is detectable: too few samples, or too few correct answers to lose.
    """
    if drops.binary:
        return _smallest_loss(drops.n, _churn(drops), drops.good, alpha, power)
    error, freedom = drops.error, len(drops.sums) - 1
    if drops.span is not None and error is not None:
        return _root(lambda drop: alpha - _p_at(drops, drop, power), 0.0, drops.span)
    if not error:  # one unit, or no variation: the noise is unknown
        return None
    critical = t_quantile(alpha, freedom)
    excess = _root(lambda shift: 1 - float(special.nctdtr(freedom, shift, critical)) - power, 0.0, 2 * critical + 20)
    return None if excess is None or not math.isfinite(excess * error) else excess * error


def units_needed(drops: Drops, effect: float, alpha: float, power: float = 0.8) -> int | None:
    """Return about how many units `compare` needs to find a true drop of `effect` with this `power`.

    The noise is estimated as in `smallest_drop`. None: unknown, or any number is too small.
    """
    z = quantile(alpha), quantile(1 - power)
    if drops.binary:  # Connor (Biometrics 43, 1987), with the correction of a discrete test
        changed = 2 * _churn(drops) + effect
        if changed > 1:
            return None
        normal = (z[0] * math.sqrt(changed) + z[1] * math.sqrt(max(0.0, changed - effect**2))) / effect
        return whole(normal**2 / 4 * (1 + math.sqrt(1 + 2 / (normal**2 * effect))) ** 2)
    if drops.error is None:
        return None
    if drops.span is None:
        ratio = sum(z) * drops.error / effect
        return whole(max(2, len(drops.sums) * ratio * ratio))
    return least_units(len(drops.sums), lambda times: _p_at(drops, effect, power, times) <= alpha)


def whole(units: float) -> int | None:
    """Return a number of units, rounded up; None: above 10^12."""
    return math.ceil(units) if units <= _MOST else None


def least_units(units: int, enough: Callable[[float], bool]) -> int | None:
    """Return the least number of units for which `enough`, of their ratio to `units`, holds; None: above 10^12."""
    high = 1
    while not enough(high / units):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1 + high // 1000:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle / units) else (middle, high)
    return high


def mcnemar_power(n: int, losses: float, gains: float, alpha: float) -> float:
    """Return the power of the one-sided exact test for given shares of losses and gains."""
    either = losses + gains
    middle, reach = n * either, _REACH * math.sqrt(n * either * (1 - either)) + _REACH**2
    changed = np.arange(max(0, math.floor(middle - reach)), min(n, math.ceil(middle + reach)) + 1, dtype=np.int64)
    share = losses / either if either else 0.0
    ways = special.gammaln(n + 1) - special.gammaln(changed + 1) - special.gammaln(n - changed + 1)
    chances = np.exp(ways + special.xlogy(changed, either) + special.xlog1py(n - changed, -either))
    found = chances @ special.bdtrc(_critical(changed, alpha), changed, share)
    return float(found)


def _critical(changed: NDArray[np.int64], alpha: float) -> Floats:
    """Return for how many losses among so many changes McNemar's test just does not reject."""
    some = np.maximum(changed, 1)
    most = np.clip(np.ceil(some / 2 + quantile(alpha) * np.sqrt(some) / 2), 0, some)  # about; then counted exactly
    while (more := special.bdtr(most, some, 0.5) < 1 - alpha).any():
        most = most + more
    while (fewer := (most > 0) & (special.bdtr(np.maximum(most - 1, 0), some, 0.5) >= 1 - alpha)).any():
        most = most - fewer
    return np.where(changed == 0, 0, most)


def quantile(tail: float) -> float:
    """Return the number that a normal variable exceeds with the probability `tail`."""
    return -float(special.ndtri(tail))


def t_quantile(tail: float, freedom: int) -> float:
    """Return the number that Student's t exceeds with the probability `tail`."""
    return -float(special.stdtrit(freedom, tail))


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


@_OVERFLOWING
def _p_of(drops: Drops, sums: Floats) -> float:
    """Return the one-sided p of the losses with these sums over units: those of `drops`, or their opposite."""
    if drops.binary:
        losses, changed = int((sums > 0).sum()), int((sums != 0).sum())
        return float(special.bdtr(changed - losses, changed, 0.5))
    if drops.span is not None:
        return chance(sums, drops.sizes, drops.span, drops.rounding)
    if len(sums) < 2:
        raise EvaluationError(f"{T}: needs at least 2 independent samples")
    if drops.error is None:
        raise EvaluationError(_TOO_LARGE.format(T))
    mean = float(sums.sum()) / drops.n - drops.rounding
    if drops.error <= 1e-12 * abs(mean):
        return 1.0 if mean < 0 else 0.5 ** len(sums)
    t = mean / drops.error
    corrected = _hall(t, _skewness(sums - (sums.sum() / drops.n) * drops.sizes), len(sums))
    return float(special.stdtr(len(sums) - 1, -min(t, corrected)))


def t_bound(drops: Drops, level: float) -> float:
    """Return the upper confidence bound of the mean loss by the t test, with the correction for skewness."""
    assert drops.error is not None
    n, t = len(drops.sums), t_quantile(level, len(drops.sums) - 1)
    skew = -_skewness(drops.centred)
    if skew:  # the inverse of Hall's transformation
        t = max(t, 3 * math.sqrt(n) / skew * (math.cbrt(1 + skew * (t / math.sqrt(n) - skew / 6 / n)) - 1))
    return drops.mean + t * drops.error


def _hall(t: float, skew: float, n: int) -> float:
    """Return a t statistic corrected for the skewness of the n units."""
    s = t / math.sqrt(n)
    return math.sqrt(n) * (s + skew * s**2 / 3 + skew**2 * s**3 / 27 + skew / 6 / n)


def _skewness(centred: Floats) -> float:
    """Return the skewness of values whose mean is 0; 0 if all are equal."""
    spread = float(np.abs(centred).max())
    if not spread:
        return 0.0
    x = centred / spread
    return float((x**3).mean() / (x**2).mean() ** 1.5)


def _p_at(drops: Drops, drop: float, power: float, times: float = 1.0) -> float:
    """Return the p that samples with the noise of `drops` and a true drop stay below with this power."""
    assert drops.span is not None and drops.error is not None
    seen = drop - quantile(1 - power) * drops.error / math.sqrt(times)
    return chance(drops.centred + seen * drops.sizes, drops.sizes, drops.span, drops.rounding, times=times)


def _churn(drops: Drops) -> float:
    """Return the share of right or wrong answers that change by chance, in each direction."""
    return min(int((drops.losses > 0).sum()), int((drops.losses < 0).sum())) / drops.n


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
