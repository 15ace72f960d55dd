"""Say why a metric is not measured on purpose: its evaluator is off, or the world has no such data. No torch."""

from __future__ import annotations

from evaluators.metrics import Metric
from evaluators.registry import BUILT_IN, FLIPS, Evaluator, evaluators
from pytest_lmcompose.gate.globs import overlap
from pytest_lmcompose.settings import SOURCE_SETS, EvaluateSettings, WorldSettings

_SOURCES = {"edits": "edits", "facts": "facts", "texts": "perplexity"}
"""The key of the world with each part of the data."""
_ACCURACY = "accuracy/"
_KINDS = {"knowmem": "knowledge", "verbmem": "verbatim", "membership_auc": "membership"}
_KINDS |= dict.fromkeys(("privleak", "privleak_distance"), "membership")
"""The key of the world with the data of a metric of unlearning data, by what its name starts with; others: qa."""
_QA_SETS = {
    "forget_quality": ("forget",),
    "model_utility": tuple(name for name in SOURCE_SETS["qa"] if name != "forget"),
}
"""The question sets that a metric needs, if its name does not end in one."""


def why_off(glob: str, world: WorldSettings, evaluate: EvaluateSettings) -> str | None:
    """Return why no metric that `glob` matches is measured; None if one should be, or if nothing is known of it."""
    found = [(e, m) for e in evaluators().values() for m in e.metrics if overlap(glob, m.name)]
    found = [pair for pair in found if pair[1].name == glob] or found
    reasons = [_reason(evaluator, metric, glob, world, evaluate) for evaluator, metric in found]
    return None if None in reasons else next(iter(reasons), None)


def _reason(
    evaluator: Evaluator, metric: Metric, glob: str, world: WorldSettings, evaluate: EvaluateSettings
) -> str | None:
    if evaluator in BUILT_IN:
        if not getattr(evaluate, evaluator.name):
            return f"evaluate.{evaluator.name}=false"
    elif evaluator.name not in evaluate.also:
        return f"evaluate.also.{evaluator.name} is not set"
    kind, _, changed = glob.partition("/")
    if kind in FLIPS and changed:  # answers that are not measured cannot change
        return why_off(changed, world, evaluate)
    if (key := _SOURCES.get(metric.data)) is not None and getattr(world, key) is None:
        return f"world.{key}=null"
    if metric.data == "questions" and not evaluate.tasks:
        pool = metric.name.removeprefix(_ACCURACY)
        if not world.pools:
            return "world.pools is empty"
        if "*" not in pool and pool not in world.pools:
            return f"world.pools has no {pool}"
    if metric.data == "refusal prompts":
        name = "harmless" if metric.name.startswith("over_") else "harmful"
        return None if name in world.refusal_heldout else f"world.refusal_heldout has no {name}"
    if metric.data == "unlearning data":
        return _no_set(metric.name if "*" in glob else glob, world)
    if metric.data == "tuning data":
        _, _, name = glob.partition("/")
        key = "tuning_heldout" if "/" in metric.name else "preferences_heldout"
        if not (sets := getattr(world, key)):
            return f"world.{key}=null" if sets is None else f"world.{key} is empty"
        if name and "*" not in name and name not in sets:
            return f"world.{key} has no {name}"
    return None


def _no_set(metric: str, world: WorldSettings) -> str | None:
    """Return why a world has no data for a metric of unlearning data, None if it has."""
    kind, _, name = metric.partition("/")
    key = "verbatim" if name == "verbatim" else _KINDS.get(kind, "qa")
    sets = getattr(world, key)
    if sets is None:
        return f"world.{key}=null"
    if not sets:
        return f"world.{key} is empty"
    needed = _QA_SETS.get(metric, (name,) if name in SOURCE_SETS.get(key, ()) else ())
    return next((f"world.{key} has no {one}" for one in needed if one not in sets), None)
