"""Test a mean loss by samples in a known range, whatever their distribution.

The t test takes the samples for typical. If most samples get a little worse and a few get much better, a sample without
the few looks like a loss. This test adds one more sample, which changed as far as a sample can, and weights all of them
at random, with independent exponential weights; p is the chance that the weighted mean is no loss. So Gaffke
(Mathematical Methods of Statistics 14, 2005) and Learned-Miller and Thomas (arXiv 1905.06208) bound a mean. For right
or wrong answers this is McNemar's exact test. That it holds its level for every distribution in the range is not
proven, but no counterexample is known.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Floats = NDArray[np.float64]
_STEP = 0.08
"""Step of the integral, which is exact to about 10 digits."""
_OUTER = 500
"""Smallest and largest values that are always taken one by one."""
_NEGLIGIBLE = 60.0
"""Where the integral ends: its terms have fallen by a factor of exp(30)."""


def chance(losses: Floats, sizes: Floats, span: float, bound: float = 0.0, *, times: float = 1.0) -> float:
    """Return the p-value of the hypothesis that the mean loss is at most `bound`.

    `losses` are sums over the samples of independent units, `sizes` their numbers of samples, and `span` is the
    furthest that a sample can change. With `times`, as if there were as many times the units.
    """
    y = np.append(losses - bound * sizes, -(span + bound) * sizes.max())
    counts = np.append(np.full(len(losses), times), 1.0)
    return _below_zero(y, counts)


def upper_bound(losses: Floats, sizes: Floats, span: float, level: float) -> float:
    """Return the upper confidence bound of the mean loss; arguments as in `chance`."""
    mean = float(losses.sum() / sizes.sum())
    if mean >= span:
        return span

    def excess(bound: float) -> float:
        return chance(-losses, sizes, span, -bound) - level

    return float(brentq(excess, mean, span, xtol=1e-9 * span)) if excess(mean) > 0 else mean


def _below_zero(y: Floats, counts: Floats) -> float:
    """Return P(S <= 0) of S, the sum of `y` times independent gamma variables with the shapes `counts`.

    With K(s) = log E exp(sS) and any c < 0, this is the integral of -exp(K(s)) / s over s = c + it, divided by 2 pi i
    (Lugannani and Rice 1980); for c > 0, the same integral gives P(S > 0). The line through the saddlepoint, where K is
    smallest, is the best one, and t = sinh(u) makes the trapezoidal rule converge exponentially.
    """
    low, high = float(y.min()), float(y.max())
    if high <= 0:
        return 1.0
    if low >= 0:
        return 0.0
    values, counts = _grouped(y, counts)
    least = 0.5 / math.sqrt(counts @ values**2)
    c = _saddlepoint(values, counts, low, high)
    c = c if abs(c) > least else math.copysign(least, c)  # 1 / s is not smooth near 0
    tilted = values / (1 - c * values)
    scale = 1 / math.sqrt(counts @ tilted**2)
    end = 3.0
    while counts @ np.log1p((scale * math.sinh(end) * tilted) ** 2) < _NEGLIGIBLE:
        end += 1
    u = np.arange(0, end, _STEP)
    t = scale * np.sinh(u)
    steps = np.outer(t, tilted)
    size, angle = np.exp(-0.5 * np.log1p(steps**2) @ counts), np.arctan(steps) @ counts
    terms = size * (c * np.cos(angle) + t * np.sin(angle)) / (c * c + t * t) * scale * np.cosh(u)
    terms[0] /= 2
    whole = _STEP / math.pi * float(terms.sum()) * math.exp(-float(counts @ np.log1p(-c * values)))
    return min(1.0, max(0.0, -whole if c < 0 else 1 - whole))


def _grouped(y: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Return the distinct values with their counts; of very many, the inner ones as means of neighbours."""
    values, places = np.unique(y, return_inverse=True)
    counts = np.asarray(np.bincount(places, counts), dtype=np.float64)
    if len(values) <= 4 * _OUTER:
        return values, counts
    middle = np.linspace(_OUTER, len(values) - _OUTER, 2 * _OUTER, endpoint=False).astype(int)
    starts = np.concatenate([np.arange(_OUTER), middle, np.arange(len(values) - _OUTER, len(values))])
    totals = np.add.reduceat(counts, starts)
    return np.add.reduceat(values * counts, starts) / totals, totals


def _saddlepoint(y: Floats, counts: Floats, low: float, high: float) -> float:
    """Return s between 1/low and 1/high at which the derivative of K is 0."""
    left, right = (1 - 1e-9) / low, (1 - 1e-9) / high

    def slope(s: float) -> float:
        return float(counts @ (y / (1 - s * y)))

    if slope(left) >= 0:
        return left
    return right if slope(right) <= 0 else float(brentq(slope, left, right, xtol=1e-9 * min(-left, right)))
