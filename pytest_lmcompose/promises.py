"""What the steps of a composition promise of the model that comes out, and which later step breaks a promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from interventions.registry import find_method
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.recipe import Recipe

_ATTACK = "relearn"
"""Of the category `unlearn`, and meant to bring knowledge back."""


@dataclass(frozen=True)
class Promise:
    """What one step promises."""

    step: Step
    what: str
    """edit, unlearn, bits or sparsity."""
    value: float | None
    """The bits, or the share of zeros."""
    broken_by: Step | None
    """The first later step that does not keep it; None: it holds at the end."""

    def why(self, composition: Composition) -> str:
        """Say why a promise that is broken cannot hold, and what to do."""
        assert self.broken_by is not None
        said = {"bits": f"{self.value:g} bits", "sparsity": f"{self.value:g} of zeros"} if self.value else {}
        promised = said.get(self.what, "that knowledge is gone")
        if self.broken_by.method == _ATTACK and self.what == "unlearn":
            return f"{self.step} promises {promised}, and {self.broken_by}, an attack, follows it"
        return f"{self.step} promises {promised}, but {self.broken_by} follows it: use {composition}+{self.step}"


def promises(recipe: Recipe, composition: Composition) -> Iterator[Promise]:
    """Yield what each step promises, in their order."""
    for place, step in enumerate(composition.steps):
        later = composition.steps[place + 1 :]
        category, settings = find_method(step.method).category, recipe.settings(step)
        if category == "compress":
            for what in ("bits", "sparsity"):
                if isinstance(value := getattr(settings, what, None), (int, float)):
                    yield Promise(step, what, value, next((s for s in later if _breaks(what, s, recipe)), None))
        elif step.method != _ATTACK:
            attack = next((s for s in later if category == "unlearn" and s.method == _ATTACK), None)
            yield Promise(step, category, None, attack)


def broken(recipe: Recipe, composition: Composition) -> list[str]:
    """Return why promises cannot hold at the end, those left out that a later step makes good."""
    found = list(promises(recipe, composition))
    held = {(promise.what, promise.value) for promise in found if promise.broken_by is None}
    return [p.why(composition) for p in found if p.broken_by is not None and (p.what, p.value) not in held]


def _breaks(what: str, step: Step, recipe: Recipe) -> bool:
    """Say whether a step changes weights off the grid of their bits, or from zero."""
    method, settings = find_method(step.method), recipe.settings(step)
    if what == "sparsity":  # the compressors without the setting round 0 to 0, or only add zeros
        return not getattr(settings, "preserve_mask", method.category == "compress")
    # A compressor that rounds has a grid of its own, and one with damping makes good what it prunes.
    return method.category != "compress" or hasattr(settings, "bits") or hasattr(settings, "damping")
