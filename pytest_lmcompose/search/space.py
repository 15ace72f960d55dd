"""What a search may change in a composition: one dial for each thing, with its options. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from interventions.ranges import searched, shown
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.recipe import Recipe, quoted

Point = tuple[int, ...]
"""The chosen option of each dial."""
_ORDERS = 24
"""Maximum number of orders; those that swap the fewest steps come first."""
_LAYERS = 8
"""Layers that other steps changed are spared by name, up to this many."""


@dataclass(frozen=True)
class Dial:
    """One thing that can be changed."""

    kind: Literal["order", "again", "setting", "layers"]
    options: tuple[Any, ...]
    asked: int = 0
    """The option that was asked for. Options of a setting go from the strongest step to the mildest."""
    step: int = 0
    """Place of the step in the composition that was asked for."""
    key: str = ""
    """The setting."""
    named: bool = False
    """Whether its options are named, as bits are, and not multiples of what was asked for."""

    def cost(self, option: int) -> int:
        """Return how far an option is from what was asked for."""
        if option == self.asked:
            return 0
        if self.kind == "order":
            return _swaps(self.options[option])
        return 1 + abs(option - self.asked) if self.kind == "setting" else 2


@dataclass(frozen=True)
class Space:
    """All compositions that a search may try."""

    steps: tuple[Step, ...]
    """As asked for."""
    dials: tuple[Dial, ...]

    @property
    def asked(self) -> Point:
        """What was asked for."""
        return tuple(dial.asked for dial in self.dials)

    @property
    def points(self) -> int:
        """The number of points."""
        count = 1
        for dial in self.dials:
            count *= len(dial.options)
        return count

    def distance(self, point: Point) -> int:
        """Return how far a point is from what was asked for: the sum over its changes; see docs/repair.md."""
        return sum(dial.cost(option) for dial, option in zip(self.dials, point, strict=True))

    def changed(self, point: Point) -> Iterator[tuple[Dial, Any]]:
        """Yield the dials that differ from what was asked for, with their options."""
        for dial, option in zip(self.dials, point, strict=True):
            if option != dial.asked:
                yield dial, dial.options[option]

    def composition(self, point: Point) -> Composition | None:
        """Return the composition of a point; None if it repeats its last step."""
        steps, places = list(self.steps), self.places(point)
        for dial, option in self.changed(point):
            if dial.key:
                step = steps[dial.step]
                steps[dial.step] = Step(step.method, (*_without(step, dial.key), (dial.key, _text(option))))
        return None if places[-1:] == places[-2:-1] else Composition(tuple(steps[place] for place in places))

    def places(self, point: Point) -> tuple[int, ...]:
        """Return which steps that were asked for the composition of a point has, in its order."""
        chosen = {dial.kind: option for dial, option in self.changed(point)}
        order, again = chosen.get("order", range(len(self.steps))), chosen.get("again")
        return (*order, *(() if again is None else (again,)))

    def words(self, point: Point) -> tuple[str, ...]:
        """Return the changes in words."""
        return tuple(self._words(dial, option) for dial, option in self.changed(point))

    def _words(self, dial: Dial, option: Any) -> str:
        if dial.kind == "order":
            return "order " + ", ".join(self.steps[place].method for place in option)
        method = self.steps[option if dial.kind == "again" else dial.step].method
        if dial.kind == "again":
            return f"{method} again"
        if dial.kind == "layers":
            return f"{method}.{dial.key}={shown(option)}"
        return f"{method}.{dial.key} {shown(dial.options[dial.asked])} -> {shown(option)}"

    def moved(self, point: Point, place: int, option: int) -> Point:
        """Return a point with another option of one dial."""
        return (*point[:place], option, *point[place + 1 :])

    def neighbours(self, point: Point) -> Iterator[tuple[int, Point]]:
        """Yield the points that differ in one dial, settings by one place, with the number of the dial."""
        for place, (dial, now) in enumerate(zip(self.dials, point, strict=True)):
            near = (now - 1, now + 1) if dial.kind == "setting" else range(len(dial.options))
            yield from ((place, self.moved(point, place, o)) for o in near if o != now and 0 <= o < len(dial.options))


def space_of(
    recipe: Recipe, composition: Composition, changed: Mapping[int, Collection[str]], only: int | None = None
) -> Space:
    """Return what may be changed in a composition.

    `changed` has the names of the parameters that each step changed. With `only`, the settings of one step alone.
    """
    steps = composition.steps
    dials = [] if only is not None else [*_order(steps), Dial("again", (None, *range(len(steps))))]
    for place in range(len(steps)) if only is None else [only]:
        others = dict.fromkeys(name for other, names in changed.items() if other != place for name in names)
        for key, value, hint, search in searched(recipe.settings(steps[place])):
            if search.layers:
                dials.append(Dial("layers", (value, *_spared(value or [], search.layers, list(others))), 0, place, key))
            elif options := search.options(value, hint):
                dials.append(Dial("setting", tuple(options), options.index(value), place, key, bool(search.values)))
    return Space(steps, tuple(dials))


def _order(steps: Sequence[Step]) -> list[Dial]:
    """Return the dial of the order, none if there is only one."""
    several = sorted(itertools.islice(itertools.permutations(range(len(steps))), 5040), key=_swaps)
    distinct = {tuple(steps[place] for place in order): order for order in reversed(several)}
    orders = sorted(distinct.values(), key=_swaps)[:_ORDERS]
    return [Dial("order", tuple(orders))] if len(orders) > 1 else []


def _swaps(order: Sequence[int]) -> int:
    """Return how many pairs of steps have changed places."""
    return sum(one > two for one, two in itertools.combinations(order, 2))


def _spared(before: Sequence[str], forms: Sequence[str], parameters: Sequence[str]) -> Iterator[list[str]]:
    """Yield lists of layers to spare: those that other steps changed, then the first and the last block."""
    names = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    sets = [names] if 0 < len(names) <= _LAYERS else []
    for layers in (*sets, ["first", "last"]):
        for form in forms:
            added = [form.format(layer) for layer in layers]
            yield [*(one for one in before if one not in added), *added]  # the last one that matches counts


def _without(step: Step, key: str) -> list[tuple[str, str]]:
    return [pair for pair in step.settings if pair[0] != key]


def _text(value: Any) -> str:
    """Return a value as in a composition's id."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    return quoted(value) if isinstance(value, str) else shown(value)
