"""Order-free error, order sensitivity and interference of a sequence of steps.

The first two follow Kolbeinsson et al. 2025 ("Composable Interventions for Language Models"), extended from pairs to
any number of steps and to incomplete sets of orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluators.measurement import EvaluationError

Order: TypeAlias = tuple[str, ...]
"""Names of steps, the first applied first."""
Values: TypeAlias = Mapping[Order, float | Sequence[float]]
"""The metric's value of each order, or its values over repeats, which are averaged."""
Link = Literal["mean", "exp"]
"""How the value follows from the samples: their mean, or the exponential of the mean (perplexity)."""
Floats: TypeAlias = NDArray[np.float64]
_DRAWS = 1 << 22  # maximum number of sample counts in memory


class Interval(NamedTuple):
    """A value and the confidence interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Composability:
    """Order-free error and order sensitivity of a set of steps, with intervals."""

    best: Order
    order_free_error: Interval
    order_sensitivity: Interval


@dataclass(frozen=True)
class Interference:
    """Change of each metric by the steps after each step."""

    steps: Order
    metrics: tuple[str, ...]
    change: tuple[tuple[float, ...], ...]
    """(steps, metrics): value at the end minus value right after the step; NaN if either is unknown."""


def order_free_error(values: Values, *, higher_is_better: bool) -> float:
    """Return the error of the best order: 1 minus its value if higher is better, otherwise the value.

    The error also contains what the base model gets wrong, so no order reaches 0 on most metrics.
    Raises EvaluationError for a NaN, a single order, or orders of different steps.
    """
    means = _means(values).values()
    return 1 - max(means) if higher_is_better else min(means)


def order_sensitivity(values: Values) -> float:
    """Return the largest difference between two orders; for two steps, |m(A, B) - m(B, A)|.

    Infinite if some orders are infinite, NaN if all are.
    Raises EvaluationError for a NaN, a single order, or orders of different steps.
    """
    means = _means(values).values()
    return max(means) - min(means)


def best_order(values: Values, *, higher_is_better: bool) -> Order:
    """Return the order with the best value, the first of equal ones; raises like `order_free_error`."""
    means = _means(values)
    return (max if higher_is_better else min)(means, key=means.__getitem__)


def bootstrap_orders(
    samples: Mapping[Order, Sequence[ArrayLike]],
    *,
    higher_is_better: bool,
    generator: np.random.Generator,
    clusters: Sequence[Sequence[Hashable]] | None = None,
    same_samples: bool = False,
    link: Link = "mean",
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Composability:
    """Compute both metrics from per-sample outcomes, with paired bootstrap intervals.

    `samples` has a list of outcomes per repeat for each order, over the same samples in every order.
    A resample draws repeats, then samples within each (Davison and Hinkley 1997, section 3.8), equally
    in all orders. `clusters` are the labels of one order's `samples`; clusters are drawn as a whole.
    With `same_samples` all repeats share their samples, and one draw serves all repeats.

    The intervals are simultaneous: they bound the largest error over all orders. So they hold for the
    best order although it is selected from the data, and the interval of the sensitivity includes 0 if
    the orders may be equal. Sensitivity is clipped at 0 and values at the extreme samples. Constant
    outcomes have an interval of width 0, and two or three repeats underestimate their variance.

    Raises EvaluationError for NaN or infinite samples, and for orders whose samples cannot be paired.
    """
    tables = _tables(samples)
    orders = list(tables)
    runs = [np.stack([tables[order][r] for order in orders]) for r in range(len(tables[orders[0]]))]  # (orders, n)
    units = [_per_unit(run, None if clusters is None else clusters[r]) for r, run in enumerate(runs)]
    if same_samples and len({len(sizes) for _, sizes in units}) > 1:
        raise EvaluationError("same_samples: the repeats have different numbers of samples")
    centre = np.mean([_linked(sums.sum(1) / sizes.sum(), link) for sums, sizes in units], axis=0)  # (orders,)
    batch = max(1, _DRAWS // max(len(sizes) for _, sizes in units))
    drawn = np.concatenate(
        [
            _resampled(units, min(batch, resamples - start), generator, same_samples, link)
            for start in range(0, resamples, batch)
        ],
        axis=1,
    )
    error = drawn - centre[:, None]  # (orders, resamples)
    highest, lowest = error.max(0), error.min(0)
    off, apart = np.quantile([np.maximum(highest, -lowest), highest - lowest], confidence, axis=1).tolist()
    means = {order: float(v) for order, v in zip(orders, centre, strict=True)}
    best = best_order(means, higher_is_better=higher_is_better)
    gap = order_sensitivity(means)
    edges = _linked(np.asarray([min(run.min() for run in runs), max(run.max() for run in runs)]), link)
    low, high = max(means[best] - off, float(edges[0])), min(means[best] + off, float(edges[1]))
    free = Interval(1 - means[best], 1 - high, 1 - low) if higher_is_better else Interval(means[best], low, high)
    widest = max(gap, float(edges[1] - edges[0]))
    return Composability(best, free, Interval(gap, max(0.0, gap - apart), min(gap + apart, widest)))


def interference(steps: Order, after: Sequence[Mapping[str, float] | None], metrics: Iterable[str]) -> Interference:
    """Compare the end of a composition with its intermediate states.

    `after` has the metrics of the state after each step, or None if not measured; the last is the end.
    A metric that a state lacks is NaN.
    Raises EvaluationError if the end is missing, or steps and states differ in number.
    """
    names = tuple(metrics)
    if len(steps) != len(after) or not steps:
        raise EvaluationError(f"{len(steps)} steps but {len(after)} states; give one state per step")
    end = after[-1]
    if end is None:
        raise EvaluationError(f"{'+'.join(steps)}: the end was not measured; measure the whole composition")
    change = tuple(
        tuple(end.get(name, math.nan) - (state or {}).get(name, math.nan) for name in names) for state in after
    )
    return Interference(steps, names, change)


def _means(values: Values) -> dict[Order, float]:
    """Return each order's mean over repeats."""
    _check_orders(values)
    means = {}
    for order, value in values.items():
        runs: list[float] = np.asarray(value, dtype=np.float64).ravel().tolist()
        if not runs or any(math.isnan(run) for run in runs):
            raise EvaluationError(f"{'+'.join(order)}: {'a value is NaN' if runs else 'no value'}; measure it again")
        means[order] = math.fsum(runs) / len(runs) if all(map(math.isfinite, runs)) else sum(runs)
        if math.isnan(means[order]):
            raise EvaluationError(f"{'+'.join(order)}: its repeats are infinite in both directions")
    return means


def _check_orders(orders: Iterable[Order]) -> None:
    known = list(orders)
    for order in known:
        if not isinstance(order, tuple):
            raise EvaluationError(f"{order!r} is not an order; give a tuple of step names")
    if len(known) < 2:
        raise EvaluationError(f"{len(known)} order{'s' * (not known)} of the steps; at least two are needed")
    for order in known[1:]:
        if sorted(order) != sorted(known[0]):
            raise EvaluationError(f"{'+'.join(order)} and {'+'.join(known[0])} are not orders of the same steps")


def _tables(samples: Mapping[Order, Sequence[ArrayLike]]) -> dict[Order, list[Floats]]:
    """Return the outcomes of each order by repeat; raises EvaluationError if they cannot be paired."""
    _check_orders(samples)
    tables = {order: [np.asarray(run, dtype=np.float64) for run in runs] for order, runs in samples.items()}
    shapes = {order: [run.shape for run in runs] for order, runs in tables.items()}
    for (first, one), (second, other) in itertools.pairwise(shapes.items()):
        if one != other:
            raise EvaluationError(f"{'+'.join(first)} and {'+'.join(second)} cannot be paired: samples {one}, {other}")
    for order, runs in tables.items():
        if not runs or any(run.ndim != 1 or not run.size for run in runs):
            raise EvaluationError(
                f"{'+'.join(order)}: expected a list of samples for each repeat, found {shapes[order]}"
            )
        if not all(np.isfinite(run).all() for run in runs):
            raise EvaluationError(f"{'+'.join(order)}: some samples are NaN or infinite")
    return tables


def _per_unit(run: Floats, labels: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Return sums over independent units, (orders, units), and the units' sizes."""
    if labels is None:
        return run, np.ones(run.shape[1])
    if len(labels) != run.shape[1]:
        raise EvaluationError(f"{len(labels)} clusters for {run.shape[1]} samples; give one label per sample")
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    index = [number[label] for label in labels]
    return np.stack([np.bincount(index, row) for row in run]), np.bincount(index).astype(np.float64)


def _resampled(
    units: Sequence[tuple[Floats, Floats]], count: int, generator: np.random.Generator, same: bool, link: Link
) -> Floats:
    """Return the value of each order in `count` resamples, (orders, count)."""
    repeats = len(units)
    total = np.zeros((units[0][0].shape[0], count))
    picked = generator.integers(repeats, size=(count, repeats))
    shared = _draw(generator, len(units[0][1]), count) if same else None
    for slot in range(repeats):
        for repeat, (sums, sizes) in enumerate(units):
            rows = np.flatnonzero(picked[:, slot] == repeat)
            draws = _draw(generator, len(sizes), len(rows)) if shared is None else shared
            draws = draws if len(draws) == len(rows) else draws[rows]
            total[:, rows] += _linked(sums @ draws.T / (draws @ sizes), link)
    return total / repeats


def _draw(generator: np.random.Generator, n: int, count: int) -> Floats:
    """Return the counts of `n` units in `count` bootstrap draws of n units, (count, n)."""
    chosen = generator.integers(n, size=(count, n))
    chosen += n * np.arange(count)[:, None]
    return np.bincount(chosen.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)


def _linked(means: Floats, link: Link) -> Floats:
    return np.exp(means) if link == "exp" else means
