"""Ranges of settings, annotated on the fields of their dataclass and checked when it is created. Imports no torch.

    @dataclass(frozen=True)
    class PruneSettings(Checked):
        sparsity: Annotated[float, Range(0, below=1)] = 0.5
        layers: Annotated[list[Annotated[int, Range(0)]], Items(rising=True)] | None = None

Types are checked without conversion, except that a whole number is a valid float. Bools, NaN and infinity are not
numbers. A text may be empty only if it is neither optional nor an item of a list.
"""

from __future__ import annotations

import dataclasses
import itertools
import keyword
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from interventions.names import near_names
from interventions.types import InterventionError

_LARGEST = 1e30
"""Largest number; beyond it, float32 computations overflow."""
_LONGEST = 100
"""Maximum characters of a value in a message."""


class SettingError(InterventionError, ValueError):
    """An invalid setting; the message starts with key and value: `bits=33: expected ...`."""


@dataclass(frozen=True)
class Range:
    """Numbers >= `low`, > `above`, <= `high` and < `below`, or one of `also`."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def holds(self, value: float) -> bool:
        """Return whether a number is in the range."""
        return value in self.also or not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        low, high = self.low, self.high
        if self.above is not None:
            start = f"above {self.above}"
        else:
            start = "" if low is None else str(low) if low == high else f"from {low}"
        if high is not None:
            end = "" if low == high else f"to {high}" if start else f"up to {high}"
        elif self.below is not None:
            end = f"to less than {self.below}" if start else f"less than {self.below}"
        else:
            end = "" if low is None else "up"
        return " ".join(filter(None, (start, end))) + "".join(f", or {number}" for number in self.also)


@dataclass(frozen=True, init=False)
class Choice:
    """A fixed set of texts."""

    known: tuple[str, ...]

    def __init__(self, *known: str) -> None:
        object.__setattr__(self, "known", known)

    def holds(self, value: str) -> bool:
        """Return whether a text is one of them."""
        return value in self.known

    def __str__(self) -> str:
        return f"one of {', '.join(self.known)}"


@dataclass(frozen=True)
class Items:
    """The length and order of a list; no item occurs twice unless it is `sorted`."""

    least: int = 1
    most: int | None = None
    rising: bool = False
    """Each item is larger than the one before."""
    sorted: bool = False
    """No item is smaller than the one before."""

    def holds(self, value: typing.Sequence[Any]) -> bool:
        """Return whether a list of valid items is valid."""
        if len(value) < self.least or (self.most is not None and len(value) > self.most):
            return False
        pairs = list(itertools.pairwise(value))
        if self.sorted:
            return all(one <= two for one, two in pairs)
        if self.rising:
            return all(one < two for one, two in pairs)
        return all(one != two for one, two in itertools.combinations(value, 2))

    def __str__(self) -> str:
        size = str(self.least) if self.least == self.most else f"at least {self.least}" if self.least else ""
        return ", ".join(filter(None, (size, "in rising order" if self.sorted or self.rising else "none twice")))


@dataclass(frozen=True)
class Search:
    """Values of a setting that `lmcompose repair` and `lmcompose tune` try, from the strongest to the mildest step.

    Annotated beside the range of the setting. They are `values`, or the set value times each of `times` or plus each
    of `plus`. With `layers`, the setting is a list of layers to spare, and each text is one way to write a layer.
    """

    values: tuple[Any, ...] = ()
    times: tuple[float, ...] = ()
    plus: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()

    def options(self, value: Any, hint: Any) -> list[Any]:
        """Return the values to try for a setting of type `hint`, with `value` among them; none if nothing differs."""
        found = list(self.values)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            scaled = [value if factor == 1 else float(f"{value * factor:.3g}") for factor in self.times]
            found += [round(one) for one in scaled] if parts_of(hint)[0] is int else scaled
            found += [value + shift for shift in self.plus]
            if value not in found:  # it goes between its neighbours
                falls = found[-2:-1] > found[-1:]
                before = [place for place, one in enumerate(found) if (one > value if falls else one < value)]
                found.insert(before[-1] + 1 if before else 0, value)
        found = [one for one in dict.fromkeys(found) if _fits(hint, one)]
        return found if value in found and len(found) > 1 else []


Rule = Range | Choice | Items
Count = Annotated[int, Range(1)]
"""A whole number from 1 up."""
Share = Annotated[float, Range(0, below=1)]
"""A number from 0 to less than 1."""
Weight = Annotated[float, Range(0)]
"""A number from 0 up."""
Positive = Annotated[float, Range(above=0)]
"""A number above 0."""
SMALLER_IS_MILDER = Search(times=(4, 2, 1, 0.5, 0.25))
LARGER_IS_MILDER = Search(times=(0.1, 0.3, 1, 3, 10))
LearningRate = Annotated[Positive, SMALLER_IS_MILDER]
Updates = Annotated[Count, SMALLER_IS_MILDER]
"""A number of updates, or of passes over the data."""
Strength = Annotated[Weight, SMALLER_IS_MILDER]
"""The weight of what changes the model."""
Restraint = Annotated[Weight, LARGER_IS_MILDER]
"""The weight of what should stay as it is."""
Preserve = Annotated[bool, Search((False, True))]
"""Whether to leave something as it is."""
Layer = Annotated[int, Range(0)]
"""The index of a decoder block."""
Layers = Annotated[list[Layer], Items(rising=True)]
"""Indices of decoder blocks."""
Fractions = Annotated[list[Share], Items(least=2, most=2, sorted=True)]
"""First and last block, as fractions of depth."""


class Checked:
    """A settings dataclass that checks its fields when it is created; raises SettingError."""

    def __post_init__(self) -> None:
        """Check each field, then their combination."""
        check_settings(self)

    def problems(self) -> Iterator[str]:
        """Yield errors in the combination of valid fields, each as `key=value: what is expected`."""
        yield from ()


def check_settings(settings: Any) -> None:
    """Check the fields of any settings dataclass; raises SettingError."""
    kind: type = type(settings)
    for key, hint in field_types(kind).items():
        value = getattr(settings, field_name(key))
        if not dataclasses.is_dataclass(hint):
            check_value(key, hint, value)
        elif not isinstance(value, typing.cast(type, hint)):
            raise SettingError(f"{key}={shown(value)}: expected {describe(hint)}")
        else:
            try:
                check_settings(value)
            except SettingError as error:
                raise SettingError(f"{key}.{error}") from None
    if isinstance(settings, Checked):
        for problem in settings.problems():
            raise SettingError(problem)


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's settings, with their annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {setting_name(field.name): hints[field.name] for field in dataclasses.fields(kind)}


def field_name(setting: str) -> str:
    """Return the name of the field that holds a setting: `with_` for `with`, which is a keyword of Python."""
    return f"{setting}_" if keyword.iskeyword(setting) else setting


def setting_name(field: str) -> str:
    """Return the name of the setting that a field holds."""
    bare = field.removesuffix("_")
    return bare if keyword.iskeyword(bare) else field


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return settings as plain data."""
    return {setting_name(name): value for name, value in dataclasses.asdict(settings).items()}


def check_value(key: str, hint: Any, value: Any) -> None:
    """Check a value for a field of type `hint`; raises SettingError that starts with `key`.

    A dataclass can be given as a mapping of some of its keys.
    """
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = field_types(typing.cast(type, hint))
        for name, item in value.items():
            if name not in known:
                near = near_names(str(name), known)
                raise SettingError(f"{key}={shown(value)}: unknown key {name!r}.{near} Known: {', '.join(known)}.")
            check_value(f"{key}.{name}", known[name], item)
    elif not _fits(hint, value, inside=False):
        quote = f"; quote it: '{value}'" if _quotable(hint, value) else ""
        near = near_names(value, _choices(hint)) if isinstance(value, str) else ""
        raise SettingError(f"{key}={shown(value)}: expected {describe(hint)}{quote}.{near}".removesuffix("."))


def shown(value: Any) -> str:
    """Return a value as written in a recipe, on one line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = str(value)
    text = text if text.isprintable() else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def describe(hint: Any) -> str:
    """Describe the valid values of type `hint`."""
    kind, rules, optional = parts_of(hint)
    said = [str(rule) for rule in rules]
    end = ", or null" if optional else ""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return f"a list{f' ({said[0]})' if said else ''}, each {describe(arguments[0])}{end}"
    if origin is dict:
        return f"a mapping, each value {describe(arguments[1])}{end}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Any: "see there"}
    word = "" if any(isinstance(rule, Choice) for rule in rules) else words.get(kind, kind.__name__)
    return " ".join(filter(None, (word, *said))) + end


def searched(settings: Any) -> Iterator[tuple[str, Any, Any, Search]]:
    """Yield the settings with a `Search`, of any dataclass: key, value, type and what to try."""
    kind: type = type(settings)
    for key, hint in field_types(kind).items():
        value = getattr(settings, field_name(key))
        if dataclasses.is_dataclass(hint):
            yield from ((f"{key}.{name}", *rest) for name, *rest in searched(value))
        elif typing.get_origin(hint) is Annotated:
            yield from ((key, value, hint, rule) for rule in typing.get_args(hint)[1:] if isinstance(rule, Search))


def parts_of(hint: Any) -> tuple[Any, tuple[Rule, ...], bool]:
    """Return a type, its rules, and whether it is optional."""
    rules: list[Rule] = []
    optional = False
    while True:
        origin = typing.get_origin(hint)
        if origin is Annotated:
            hint, *beside = typing.get_args(hint)
            rules += [rule for rule in beside if isinstance(rule, (Range, Choice, Items))]
        elif origin in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint):
            others = [one for one in typing.get_args(hint) if one is not type(None)]
            if len(others) > 1:
                return Any, (), True
            hint, optional = others[0], True
        else:
            return hint, tuple(rules), optional


def _fits(hint: Any, value: Any, *, inside: bool = True) -> bool:
    kind, rules, optional = parts_of(hint)
    if value is None or kind is Any:
        return optional or kind is Any
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        fine = isinstance(value, (list, tuple)) and all(_fits(arguments[0], item) for item in value)
    elif origin is dict:
        fine = isinstance(value, Mapping) and all(
            isinstance(key, str) and key != "" and _fits(arguments[1], item) for key, item in value.items()
        )
    elif kind is int:
        fine = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.maxsize
    elif kind is float:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    else:
        fine = not isinstance(kind, type) or isinstance(value, kind)
        fine = fine and not (kind is str and (inside or optional) and not value.strip())
    return fine and all(rule.holds(value) for rule in rules)


def _quotable(hint: Any, value: Any) -> bool:
    return isinstance(value, (int, float)) and parts_of(hint)[0] is str and not _choices(hint)


def _choices(hint: Any) -> tuple[str, ...]:
    return next((rule.known for rule in parts_of(hint)[1] if isinstance(rule, Choice)), ())
