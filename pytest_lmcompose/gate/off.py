"""Say why a metric is not measured on purpose: its evaluator is off, or the world has no such data. No torch."""

from __future__ import annotations

from evaluators.metrics import Metric
from evaluators.registry import BUILT_IN, Evaluator, evaluators
from pytest_lmcompose.gate.globs import overlap
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

_SOURCES = {"edits": "edits", "facts": "facts", "texts": "perplexity"}
"""The key of the world with each part of the data."""
_ACCURACY = "accuracy/"


def why_off(glob: str, world: WorldSettings, evaluate: EvaluateSettings) -> str | None:
    """Return why no metric that `glob` matches is measured; None if one should be, or if nothing is known of it."""
    found = [(e, m) for e in evaluators().values() for m in e.metrics if overlap(glob, m.name)]
    found = [pair for pair in found if pair[1].name == glob] or found
    reasons = [_reason(evaluator, metric, world, evaluate) for evaluator, metric in found]
    return None if None in reasons else next(iter(reasons), None)


def _reason(evaluator: Evaluator, metric: Metric, world: WorldSettings, evaluate: EvaluateSettings) -> str | None:
    if evaluator in BUILT_IN:
        if not getattr(evaluate, evaluator.name):
            return f"evaluate.{evaluator.name}=false"
    elif evaluator.name not in evaluate.also:
        return f"evaluate.also.{evaluator.name} is not set"
    if (key := _SOURCES.get(metric.data)) is not None and getattr(world, key) is None:
        return f"world.{key}=null"
    if metric.data == "questions" and not evaluate.tasks:
        pool = metric.name.removeprefix(_ACCURACY)
        if not world.pools:
            return "world.pools is empty"
        if "*" not in pool and pool not in world.pools:
            return f"world.pools has no {pool}"
    return None
