"""Compute the composability section of a report.

Imports numpy only when needed: for steps in several orders, or a composition with a measured prefix.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluators.measurement import EvaluationError, per_unit, ratio_error
from evaluators.metrics import find_metric
from pytest_lmcompose.composition import BASE
from pytest_lmcompose.gate.repeats import evened, independent, link_of, scaled
from pytest_lmcompose.report.shares import shares
from pytest_lmcompose.results import (
    Composability,
    CompositionResult,
    Interference,
    Interval,
    Measured,
    OrderedSet,
    OrderValue,
    Outcome,
    StepInterference,
    replace,
)

if TYPE_CHECKING:
    from evaluators.composability import Interval as Bounds

CONFIDENCE = 0.95
RESAMPLES = 2000


def composability(
    records: Sequence[CompositionResult], seed: int, metrics: Collection[str] | None = None
) -> Composability:
    """Compute order-free error, order sensitivity, interference, survival and return.

    The first two need steps in several orders; the others need a composition with a measured prefix.
    Metrics that are not finite in some order are null, with a note. Intervals are null without
    samples to resample. `metrics` limits the computation to these metrics. What was measured in part is left out.
    """
    records = [
        replace(
            r,
            measurements=tuple(m for m in r.measurements if (metrics is None or m.metric in metrics) and not m.partial),
        )
        for r in records
    ]
    # Results of workers arrive in any order.
    measured = {r.id: r for r in sorted(records, key=lambda r: r.id) if r.status == "measured"}
    sets: defaultdict[tuple[str, ...], list[CompositionResult]] = defaultdict(list)
    for record in measured.values():
        if len(record.requested) > 1:
            sets[tuple(sorted(record.requested))].append(record)
    base = measured[BASE].by_metric if BASE in measured else {}
    several = ((steps, orders) for steps, orders in sorted(sets.items()) if len(orders) > 1)
    return Composability(
        CONFIDENCE,
        RESAMPLES,
        tuple(entry for steps, orders in several for entry in _orders(steps, orders, base, seed)),
        tuple(_interferences(measured)),
        **shares(measured),
    )


def _orders(
    steps: tuple[str, ...], records: Sequence[CompositionResult], base: Mapping[str, Measured], seed: int
) -> Iterator[OrderedSet]:
    """Yield an entry for each metric that these steps can affect."""
    tables = {record.requested: record.by_metric for record in records}
    ran = [step for record in records for step in record.steps]
    categories = {step.category for step in ran}
    promised = None if any(step.promises is None for step in ran) else {m for step in ran for m in step.promises or ()}
    for name, first in next(iter(tables.values())).items():
        metric = find_metric(name, higher_is_better=first.higher_is_better)
        if all(name in table for table in tables.values()) and metric.concerns(categories, promised):
            yield _entry(steps, {order: table[name] for order, table in tables.items()}, base.get(name), seed)


def _entry(
    steps: tuple[str, ...], found: Mapping[tuple[str, ...], Measured], base: Measured | None, seed: int
) -> OrderedSet:
    from evaluators.composability import best_order, order_free_error, order_sensitivity

    first = next(iter(found.values()))
    better = first.higher_is_better
    orders = tuple(OrderValue("+".join(order), measured.value) for order, measured in found.items())
    n, repeats = first.n, len(first.runs)
    values = {order: measured.value for order, measured in found.items() if measured.value is not None}
    if len(values) < len(found):
        note = "not finite in some order"
        return OrderedSet(steps, first.metric, better, orders, None, None, None, n, repeats, note)
    intervals, note = _intervals(steps, first.metric, found, base, seed)
    error, gap = intervals or (None, None)
    free: Interval | None = _around(order_free_error(values, higher_is_better=better), error)
    if better and max(values.values()) > 1:
        free = None
        note = "; ".join(filter(None, ("no share of 1, so it has no order-free error", note)))
    sensitivity = _around(order_sensitivity(values), gap)
    best = "+".join(best_order(values, higher_is_better=better))
    return OrderedSet(steps, first.metric, better, orders, best, free, sensitivity, n, repeats, note)


def _intervals(
    steps: tuple[str, ...],
    metric: str,
    found: Mapping[tuple[str, ...], Measured],
    base: Measured | None,
    seed: int,
) -> tuple[tuple[Bounds, Bounds] | None, str]:
    """Return the intervals of order-free error and order sensitivity, or None with the reason."""
    import numpy as np

    from evaluators.composability import bootstrap_orders

    runs = {order: m.runs for order, m in found.items()}
    samples = {order: [_evened(run) for run in group] for order, group in runs.items()}
    links = {link_of(run.value, even) for o, group in runs.items() for run, even in zip(group, samples[o], strict=True)}
    counts = {len(run.samples) for group in runs.values() for run in group}
    link = links.pop()
    if links or link is None:
        return None, "no interval: the samples do not average to the value"
    units = {len(set(run.clusters)) or len(run.samples) for group in runs.values() for run in group}
    if min(units) < 2:
        return None, "no interval: a single sample"
    groups = {tuple(run.clusters for run in group) for group in runs.values()}
    if len(groups) > 1:
        return None, "no interval: the samples are grouped differently in some order"
    digest = hashlib.sha256("\n".join((str(seed), *steps, metric)).encode()).digest()
    try:
        result = bootstrap_orders(
            samples,
            higher_is_better=next(iter(found.values())).higher_is_better,
            generator=np.random.default_rng(int.from_bytes(digest[:8], "big")),
            clusters=_labels(next(iter(runs.values()))),
            same_samples=_same_samples(counts, base),
            link=link,
            resamples=RESAMPLES,
            confidence=CONFIDENCE,
        )
    except EvaluationError as error:
        return None, f"no interval: {error}"
    return (result.order_free_error, result.order_sensitivity), ""


def _same_samples(counts: set[int], base: Measured | None) -> bool:
    """Return whether all repeats have the same samples: the base model then has equal outcomes in all.

    Without the base model they count as the same, which never makes the intervals too narrow.
    """
    if len(counts) > 1:
        return False
    return base is None or len({(run.samples, run.clusters) for run in base.runs}) == 1


def _labels(runs: Sequence[Outcome]) -> list[Sequence[int]] | None:
    """Return the cluster labels of each repeat, or None if all samples are independent."""
    found = [run.clusters for run in runs]
    return [one or range(len(run.samples)) for one, run in zip(found, runs, strict=True)] if any(found) else None


class _Outcomes(NamedTuple):
    """One metric of a state, prepared for computing changes."""

    value: float
    """NaN if not finite."""
    runs: tuple[tuple[float, ...], ...]
    """Samples of each repeat, with equal weights and in the unit of the value."""
    clusters: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, measured: Measured) -> _Outcomes:
        value = math.nan if measured.value is None else measured.value
        return cls(value, tuple(map(_scaled, measured.runs)), tuple(run.clusters for run in measured.runs))


def _interferences(measured: Mapping[str, CompositionResult]) -> Iterator[Interference]:
    """Yield the interference of each composition with a measured prefix."""
    tables: dict[str, dict[str, _Outcomes]] = {}
    for record in measured.values():
        steps = record.requested
        prefixes = ["+".join(steps[:k]) for k in range(1, len(steps) + 1)]
        # Keep only the previous composition's tables, which shares prefixes: all tables are as large as the report.
        tables = {p: tables.get(p) or _outcomes(measured[p]) for p in prefixes if p in measured}
        if len(tables) > 1:
            yield _interference(record.id, steps, prefixes, tables)


def _outcomes(record: CompositionResult) -> dict[str, _Outcomes]:
    return {measured.metric: _Outcomes.of(measured) for measured in record.measurements}


def _interference(
    composition: str, steps: Sequence[str], prefixes: Sequence[str], tables: Mapping[str, Mapping[str, _Outcomes]]
) -> Interference:
    from evaluators.composability import interference

    end = tables[prefixes[-1]]
    metrics = list(end)
    states = [tables.get(p) for p in prefixes]
    values = [None if t is None else {name: found.value for name, found in t.items()} for t in states]
    found = interference(tuple(steps), values, metrics)
    return Interference(
        composition,
        tuple(metrics),
        tuple(
            StepInterference(
                step,
                prefix,
                None if table is None else tuple(None if x is None or math.isnan(x) else x for x in change),
                None if table is None else tuple(_change_error(table.get(m), end[m]) for m in metrics),
            )
            for step, prefix, table, change in zip(found.steps, prefixes, states, found.change, strict=True)
        ),
    )


def change_error(before: Measured, after: Measured) -> float | None:
    """Return the standard error of a metric's change from one state to another; None if its samples are not pairs."""
    return _change_error(_Outcomes.of(before), _Outcomes.of(after))


def _change_error(before: _Outcomes | None, after: _Outcomes) -> float | None:
    """Return the standard error of a metric's change, over paired samples."""
    if before is None or math.isnan(before.value) or math.isnan(after.value):
        return None
    runs = list(zip(before.runs, after.runs, strict=False))
    if any(len(one) != len(other) or not one for one, other in runs):
        return None
    changes = [[y - x for x, y in zip(one, other, strict=True)] for one, other in runs]
    means = [math.fsum(change) / len(change) for change in changes]
    errors = [
        ratio_error(per_unit([x - mean for x in change], clusters), len(change))
        for change, mean, clusters in zip(changes, means, after.clusters, strict=False)
    ]
    if len(errors) == 1:
        return errors[0]
    from evaluators.significance import error_over_repeats

    units = [independent(change, clusters) for change, clusters in zip(changes, after.clusters, strict=False)]
    return error_over_repeats(means, errors, units)


def _evened(run: Outcome) -> tuple[float, ...]:
    return evened(run.samples, run.weights)


def _scaled(run: Outcome) -> tuple[float, ...]:
    return () if run.value is None else scaled(run.value, _evened(run))


def _around(value: float, interval: Bounds | None) -> Interval:
    return Interval(value, *((None, None) if interval is None else (interval.low, interval.high)))
