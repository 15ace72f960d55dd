"""Look up metrics by name: unit, range, direction, categories. Imports no torch."""

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
    """Return the descriptor of the metric `name`; unknown metrics get one without range.

    Plain names take precedence over globs, and longer globs over shorter ones. The measured `higher_is_better`
    distinguishes accuracy on knowledge to unlearn from other accuracy.
    """
    return _found(tuple(evaluators()), name, higher_is_better)


@lru_cache(maxsize=2**14)  # reports look up every metric of thousands of compositions
def _found(known: tuple[str, ...], name: str, higher_is_better: bool | None) -> Metric:
    """Look a metric up among those of all evaluators, which `known` names; there may be more later, but no others."""
    matching = _matching(metrics(), name, higher_is_better)
    return max(matching, key=_rank, default=Metric(name, higher_is_better=higher_is_better))


def _matching(known: tuple[Metric, ...], name: str, higher_is_better: bool | None) -> Iterator[Metric]:
    for metric in known:
        same = higher_is_better is None or metric.higher_is_better in (None, higher_is_better)
        if same and (metric.name == name or fnmatchcase(name, metric.name)):
            yield metric


def _rank(metric: Metric) -> tuple[bool, int]:
    literal = len(metric.name.replace("*", ""))
    return literal == len(metric.name), literal
