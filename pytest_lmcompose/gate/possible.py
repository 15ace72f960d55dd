"""Reject rules that are always or never satisfied, and metrics that do not exist. Imports no torch.

The possible values of a metric are known from its evaluator (see `evaluators.metrics`). Metrics that no evaluator
describes are not checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evaluators.metrics import Metric, metrics
from evaluators.registry import evaluators
from evaluators.task_files import task_names
from interventions.names import near_names
from pytest_lmcompose.gate.globs import overlap
from pytest_lmcompose.gate.thresholds import (
    LOSS,
    LOSS_ERRORS,
    LOSS_PERCENT,
    LOST,
    NO_DROP,
    OF_EVIDENCE,
    PROMISED,
    Bound,
    Rule,
    ThresholdError,
)
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

_ENDLESS = 1e100
"""Stands in for infinity, so that differences are numbers."""
_OPEN = (NO_DROP, LOSS_ERRORS, LOST)
"""Bounds that depend on more than a value and its reference; they are not checked."""
_ACCURACY = "accuracy/"


def check_metrics(
    rules: Iterable[Rule], path: Path, world: WorldSettings, evaluate: EvaluateSettings, folder: Path
) -> None:
    """Raise ThresholdError for a bound that can never fail or never hold, and for an unknown metric.

    `folder` is the world's folder.
    """
    known = metrics()
    described = all(evaluator.metrics for evaluator in evaluators().values())
    for rule in rules:
        where = f"--lmcompose-compare-fail={rule.source!r}" if rule.source else f"{path}: {rule.composition}"
        if described and (problem := _misspelt(rule.metric, known, world, evaluate, folder)) is not None:
            raise ThresholdError(f"{where}: {problem}")
        found = [metric for metric in known if overlap(rule.metric, metric.name)]
        if not set(rule.metric) & set("*?"):
            found = _of_pool(rule.metric, [m for m in found if m.name == rule.metric] or found, world)
        for bound in rule.bounds:
            if (problem := _idle(bound, found)) is not None:
                raise ThresholdError(f"{where}: {rule.metric}: {problem}")


def _misspelt(
    name: str, known: Sequence[Metric], world: WorldSettings, evaluate: EvaluateSettings, folder: Path
) -> str | None:
    """Return why no evaluator can measure the metric `name`, None if one may."""
    if set(name) & set("*?"):
        return None
    if name.startswith(_ACCURACY):
        return _unknown_task(name.removeprefix(_ACCURACY), world, evaluate, folder)
    if "/" in name or any(overlap(name, metric.name) for metric in known):  # a question task may report any metric
        return None
    plain = [metric.name for metric in known if "*" not in metric.name]
    return f"no evaluator measures {name!r}.{near_names(name, plain)}".removesuffix(".")


def _unknown_task(name: str, world: WorldSettings, evaluate: EvaluateSettings, folder: Path) -> str | None:
    """Return which task or pool an unknown `name` was probably meant to be, None if the world may have it."""
    if not evaluate.questions or world.tasks is None:
        return None
    tasks = task_names(folder / world.tasks, [*evaluate.tasks, *itertools.chain.from_iterable(world.pools.values())])
    if tasks is None or name in tasks or name in world.pools:
        return None
    near = near_names(name, sorted({*tasks, *world.pools}), cutoff=0.8)  # others may be of another world
    return f"no question task or pool {name!r}.{near}" if near else None


def _of_pool(name: str, found: list[Metric], world: WorldSettings) -> list[Metric]:
    """Return the metrics in the direction that follows from the world's pools; `found` if they give none."""
    pool = name.removeprefix(_ACCURACY)
    if pool == name or pool not in world.pools:
        return found
    return [m for m in metrics() if m.name == f"{_ACCURACY}*" and m.higher_is_better == (pool not in world.hazardous)]


def _idle(bound: Bound, found: Sequence[Metric]) -> str | None:
    """Return why a bound can never fail or never hold for any of the metrics, None if it can or nothing is known."""
    if not found or bound.kind in _OPEN:
        return None
    ranges = [_range_of(bound, metric) for metric in found]
    what = f"{found[0].unit or 'value'} from {found[0].low:g} to {found[0].high:g}"
    if all(low >= 0 for low, _ in ranges):
        percent = f", or did you mean {bound.value:g}%?" if bound.kind == LOSS and bound.value < 100 else ""
        return f"{_words(bound)} can never fail, whatever is measured ({what}): make it stricter or remove it{percent}"
    if all(high < 0 for _, high in ranges):
        return f"{_words(bound)} can never hold, whatever is measured ({what}): make it less strict"
    return None


def _words(bound: Bound) -> str:
    unit = "%" if bound.kind == LOSS_PERCENT else ""
    return f"{bound.kind.removesuffix('_percent')} {bound.value:g}{unit}"


def _range_of(bound: Bound, metric: Metric) -> tuple[float, float]:
    """Return the smallest and largest margin that any value of the metric has to the bound; below 0 it fails.

    The margin is monotonic in the value and in the reference, so the ends of the metric's range suffice (and 0, for
    bounds that are a share of the reference).
    """
    low, high = max(metric.low, -_ENDLESS), min(metric.high, _ENDLESS)
    ends = [low, high, *([0.0] if low < 0 < high else [])]
    directions = [True, False] if metric.higher_is_better is None else [metric.higher_is_better]
    margins = [_margin(bound, metric, *case) for case in itertools.product(ends, ends, directions)]
    return min(margins), max(margins)


def _margin(bound: Bound, metric: Metric, value: float, reference: float, better: bool) -> float:
    kind, limit = OF_EVIDENCE.get(bound.kind, bound.kind), bound.value
    if kind == PROMISED:  # a tolerance for compressors, a limit for others
        slack = "compress" in metric.targeted_by
        kind, limit = (LOSS_PERCENT, 100 * limit) if slack else ("min" if better else "max", limit)
    loss = reference - value if better else value - reference
    table: Mapping[str, float] = {
        "min": value - limit,
        "max": limit - value,
        "max_drop": value - reference + limit,
        "max_rise": reference - value + limit,
        "min_ratio": value - limit * reference,
        "min_ratio_of_base": value - limit * reference,
        "max_ratio": limit * reference - value,
        "max_ratio_of_base": limit * reference - value,
        LOSS: limit - loss,
        LOSS_PERCENT: limit / 100 * abs(reference) - loss,
    }
    return table[kind]
