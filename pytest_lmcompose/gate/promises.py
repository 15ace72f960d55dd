"""What the steps of a composition promise of the model that comes out, and which later step breaks a promise.

A step promises what its settings say (`Intervention.promises`), and what its category does (`Category.promises`). A
promise of the settings is broken by the first later step that does not keep it, one of the category by an attack on it.
No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.categories import Category, categories, find_category
from interventions.intervention import Intervention, promised
from interventions.registry import find_method, methods
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.gate.globs import matches

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.recipe import Recipe


@dataclass(frozen=True)
class Promise:
    """What one step promises: the value of a metric, or what its whole category does."""

    step: Step
    category: Category
    broken_by: Step | None
    """The first later step that does not keep it; None: it holds at the end."""
    metric: str | None = None
    value: float | None = None

    @property
    def words(self) -> str:
        """What is promised, as it follows "promises"."""
        return self.category.promised if self.metric is None else f"{self.metric} = {self.value:g}"

    def about(self, measurement: Measurement) -> bool:
        """Say whether the promise is about what was measured."""
        if self.metric is not None:
            return self.metric == measurement.metric
        if self.category.removes and measurement.higher_is_better:
            return False  # of what is to stay
        return any(matches(glob, measurement.metric) for glob in self.category.promises)


def promises(recipe: Recipe, composition: Composition) -> Iterator[Promise]:
    """Yield what each step promises, in their order."""
    for place, step in enumerate(composition.steps):
        later = composition.steps[place + 1 :]
        category, settings = find_category(find_method(step.method).category), recipe.settings(step)
        for metric, value in promised(settings).items():
            breaks = (s for s in later if not _keeps(recipe.settings(s), metric))
            yield Promise(step, category, next(breaks, None), metric, value)
        if category.promises and not _undoes(settings):
            attacks = (s for s in later if category.name in _undoes(recipe.settings(s)))
            yield Promise(step, category, next(attacks, None))


def broken(recipe: Recipe, composition: Composition) -> list[str]:
    """Return why promises cannot hold at the end, those left out that a later step makes good."""
    found = list(promises(recipe, composition))
    held = {(p.category, p.metric, p.value) for p in found if p.broken_by is None}
    reasons: dict[tuple[Step, Step, bool], list[str]] = {}
    for p in found:
        if p.broken_by is not None and (p.category, p.metric, p.value) not in held:
            reasons.setdefault((p.step, p.broken_by, p.metric is None), []).append(p.words)
    return [
        f"{step} promises {' and '.join(dict.fromkeys(words))}, "
        + (f"and {breaker}, an attack, follows it" if attack else f"but {breaker} follows it: use {composition}+{step}")
        for (step, breaker, attack), words in reasons.items()
    ]


def may_be_promised(metric: str) -> bool:
    """Say whether a step may promise something of the metrics that a glob begins like.

    Known are the metrics of categories and those that methods promise with their default settings.
    """
    start = re.split(r"[*?]", metric)[0]
    known = [glob.rstrip("*") for category in categories().values() for glob in category.promises]
    known += [name for method in methods().values() for name in promised(method.settings_type()())]
    return bool(start) and any(name.startswith(start) or start.startswith(name) for name in known)


# A method whose settings are a plain dataclass keeps zeros if it has `preserve_mask`.


def _keeps(settings: Any, metric: str) -> bool:
    return bool(settings.keeps(metric) if hasattr(settings, "keeps") else Intervention.keeps(settings, metric))


def _undoes(settings: Any) -> tuple[str, ...]:
    return getattr(settings, "undoes", ())
