"""What is known about a metric, by its name: unit, range, direction, what it is about. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache

from evaluators.registry import Metric as Metric
from evaluators.registry import evaluators


def metrics() -> tuple[Metric, ...]:
    """Return the metrics of all evaluators, the built-in ones first."""
    return tuple(metric for evaluator in evaluators().values() for metric in evaluator.metrics)


def find_metric(name: str, *, higher_is_better: bool | None = None) -> Metric:
    """Return what is known about the metric `name`; a metric that no evaluator describes has no range.

    A plain name goes before a glob, and a longer glob before a shorter one. `higher_is_better`, as measured, tells
    accuracy of knowledge that should be gone from that of other knowledge.
    """
    return _found(metrics(), name, higher_is_better)


@lru_cache(maxsize=2**14)  # reports ask for every metric of thousands of compositions
def _found(known: tuple[Metric, ...], name: str, higher_is_better: bool | None) -> Metric:
    matching = _matching(known, name, higher_is_better)
    return max(matching, key=_rank, default=Metric(name, higher_is_better=higher_is_better))


def _matching(known: tuple[Metric, ...], name: str, higher_is_better: bool | None) -> Iterator[Metric]:
    for metric in known:
        same = higher_is_better is None or metric.higher_is_better in (None, higher_is_better)
        if same and (metric.name == name or fnmatchcase(name, metric.name)):
            yield metric


def _rank(metric: Metric) -> tuple[bool, int]:
    literal = len(metric.name.replace("*", ""))
    return literal == len(metric.name), literal
