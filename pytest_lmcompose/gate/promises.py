"""What the steps of a composition promise about the final model, and which later step breaks a promise.

A step's settings promise values of metrics (`Intervention.promises`), until a later step does not keep them
(`Intervention.keeps`). Its category promises, for example, that edits are there (`Category.promises`), until a later
step attacks it (`Intervention.undoes`). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from interventions.categories import Category, categories, find_category
from interventions.intervention import Intervention, promised
from interventions.registry import find_method, methods
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.gate.globs import matches

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.recipe import Recipe
    from pytest_lmcompose.steps import StepRecord


_AS_IT_RUNS = ("input_bits", "kv_cache_bits")
"""What a model rounds as it runs stays so, whatever becomes of its weights, unless a step rounds otherwise."""


@dataclass(frozen=True)
class Promise:
    """A promise of one step: the value of a metric, or what its category promises."""

    step: Step
    category: Category
    broken_by: Step | None
    """The first later step that breaks it; None if it holds at the end."""
    metric: str | None = None
    value: float | None = None
    settings: Any = field(default=None, compare=False)

    @property
    def words(self) -> str:
        """The promise in words, to follow "promises"."""
        return self.category.promised if self.metric is None else f"{self.metric} = {self.value:g}"

    def about(self, measurement: Measurement) -> bool:
        """Return whether the promise is about this measurement."""
        if self.metric is not None:
            return self.metric == measurement.metric
        if self.category.removes and measurement.higher_is_better:
            return False  # knowledge that should remain
        if isinstance(self.settings, Intervention) and not self.settings.aims_at(measurement.metric):
            return False
        return any(matches(glob, measurement.metric) for glob in self.category.promises)


def promises(recipe: Recipe, composition: Composition, ran: Sequence[StepRecord] = ()) -> Iterator[Promise]:
    """Yield the promises of all steps, in their order; those that they made for the model, if they have run."""
    for place, step in enumerate(composition.steps):
        later = composition.steps[place + 1 :]
        category, settings = find_category(find_method(step.method).category), recipe.settings(step)
        made = ran[place].report.promises if place < len(ran) else {}
        for metric, value in (made or promised(settings)).items():
            breaks = (s for s in later if not _keeps(recipe.settings(s), metric))
            yield Promise(step, category, next(breaks, None), metric, value)
        if category.promises and not _undoes(settings):
            attacks = (s for s in later if category.name in _undoes(recipe.settings(s)))
            yield Promise(step, category, next(attacks, None), settings=settings)


def unkept(recipe: Recipe, composition: Composition) -> list[Promise]:
    """Return the promises that a later step breaks, unless a step after it makes the same promise."""
    found = list(promises(recipe, composition))
    held = {(p.category, p.metric, p.value) for p in found if p.broken_by is None}
    return [p for p in found if p.broken_by is not None and (p.category, p.metric, p.value) not in held]


def broken(recipe: Recipe, composition: Composition) -> list[str]:
    """Return why promises do not hold at the end, unless a later step makes the same promise."""
    reasons: dict[tuple[Step, Step, bool], list[str]] = {}
    for p in unkept(recipe, composition):
        assert p.broken_by is not None
        reasons.setdefault((p.step, p.broken_by, p.metric is None), []).append(p.words)
    return [
        f"{step} promises {' and '.join(dict.fromkeys(words))}, "
        + (f"and {breaker}, an attack, follows it" if attack else f"but {breaker} follows it: use {composition}+{step}")
        for (step, breaker, attack), words in reasons.items()
    ]


def may_be_promised(metric: str) -> bool:
    """Return whether a category, or a method with default settings, makes a promise about metrics like the glob."""
    start = re.split(r"[*?]", metric)[0]
    known = [glob.rstrip("*") for category in categories().values() for glob in category.promises]
    known += [name for method in methods().values() for name in promised(method.settings_type()())]
    return bool(start) and any(name.startswith(start) or start.startswith(name) for name in known)


def _keeps(settings: Any, metric: str) -> bool:
    """Return whether a step with these settings, which may be a plain dataclass, keeps an earlier promise."""
    if metric in _AS_IT_RUNS and getattr(settings, "category", None) != "checkpoint":
        return metric not in promised(settings)
    return bool(settings.keeps(metric) if hasattr(settings, "keeps") else Intervention.keeps(settings, metric))


def _undoes(settings: Any) -> tuple[str, ...]:
    return getattr(settings, "undoes", ())
