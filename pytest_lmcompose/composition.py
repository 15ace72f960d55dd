"""Compositions and their ids: `memit+awq`, `awq[bits=3]+memit`, `base` for no step at all.

    id      = "base" | step ("+" step)*
    step    = method [ "[" setting ("," setting)* "]" ]
    setting = key "=" value

A value is text in Hydra's override grammar (`3`, `[2,3]`, `{a: 1}`, `'quoted'`), so commas and
brackets inside a value must be nested or quoted. Settings are kept sorted by key: one state of
the model has one id. Imports no torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NoReturn

BASE = "base"
_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_CLOSING = {"[": "]", "{": "}", "(": ")"}


class CompositionError(ValueError):
    """A composition id that cannot be read; the message points at the place."""


@dataclass(frozen=True, order=True)
class Step:
    """One application of a method, with the settings that this step overrides."""

    method: str
    settings: tuple[tuple[str, str], ...] = ()
    """(key, value text), sorted by key."""

    def __post_init__(self) -> None:
        """Sort the settings; refuse a key that stands twice."""
        ordered = tuple(sorted(self.settings))
        for (first, _), (second, _) in itertools.pairwise(ordered):
            if first == second:
                raise CompositionError(f"step {self.method!r} sets {first!r} twice")
        object.__setattr__(self, "settings", ordered)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        if not self.settings:
            return self.method
        return f"{self.method}[{','.join(f'{key}={value}' for key, value in self.settings)}]"


@dataclass(frozen=True, order=True)
class Composition:
    """An ordered sequence of steps; the empty one is the base model."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return self.id

    @cached_property
    def id(self) -> str:
        """The canonical id, which `parse` reads back."""
        return "+".join(map(str, self.steps)) or BASE

    def prefixes(self) -> tuple[Composition, ...]:
        """Return the compositions of the first 1, 2, ... steps; the last is this one."""
        return tuple(Composition(self.steps[:k]) for k in range(1, len(self.steps) + 1))


@lru_cache(maxsize=2**14)  # gates and reports read again what was collected
def parse(text: str) -> Composition:
    """Read a composition id.

    Raises CompositionError, which shows the text with a mark under the place at fault.
    """
    if text.strip() == BASE:
        return Composition()
    steps: list[Step] = []
    position = 0
    while True:
        step, position = _step(text, position)
        steps.append(step)
        if position == len(text):
            return Composition(tuple(steps))
        if text[position] != "+":
            _fail(text, position, "expected '+' or the end")
        position += 1


def permutations(
    steps: Sequence[Step], max_steps: int | None = None, category: Callable[[Step], str] | None = None
) -> tuple[Composition, ...]:
    """Return every ordered choice of distinct `steps`, of 1 up to `max_steps` of them.

    With `category`, only the choices in which no category stands twice.
    """
    kinds = steps if category is None else [category(step) for step in steps]
    kind = dict(zip(steps, kinds, strict=True))
    longest = len(set(kinds)) if max_steps is None else min(max_steps, len(set(kinds)))
    return tuple(
        Composition(choice)
        for length in range(1, longest + 1)
        for choice in itertools.permutations(steps, length)
        if len({kind[step] for step in choice}) == length
    )


def _step(text: str, position: int) -> tuple[Step, int]:
    position = _skip_spaces(text, position)
    match = _METHOD.match(text, position)
    if match is None:
        _fail(text, position, "expected the name of a method")
    if match.group() == BASE:
        _fail(text, position, f"{BASE!r} stands alone, for the model without any step")
    position = _skip_spaces(text, match.end())
    settings: list[tuple[str, str]] = []
    if text[position : position + 1] == "[":
        opened = position
        position += 1
        while True:
            key, value, position = _setting(text, position, opened)
            if any(key == earlier for earlier, _ in settings):
                _fail(text, position, f"{key!r} is set twice in one step")
            settings.append((key, value))
            position += 1
            if text[position - 1] == "]":
                break
        position = _skip_spaces(text, position)
    return Step(match.group(), tuple(settings)), position


def _setting(text: str, position: int, opened: int) -> tuple[str, str, int]:
    """Read `key=value` and return it with the position of the ',' or ']' behind it."""
    position = _skip_spaces(text, position)
    match = _KEY.match(text, position)
    if match is None:
        _fail(text, position, "expected a setting such as bits=3")
    position = _skip_spaces(text, match.end())
    if text[position : position + 1] != "=":
        _fail(text, position, f"expected '=' after {match.group()!r}")
    start = position + 1
    end = _value_end(text, start, opened)
    value = text[start:end].strip()
    if not value:
        _fail(text, start, f"{match.group()!r} has no value")
    return match.group(), value, end


def _value_end(text: str, start: int, opened: int) -> int:
    expected: list[str] = []
    quote = ""
    position = start
    while position < len(text):
        char = text[position]
        if quote:
            if char == "\\":
                position += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in _CLOSING:
            expected.append(_CLOSING[char])
        elif expected and char == expected[-1]:
            expected.pop()
        elif not expected and char in ",]":
            return position
        elif char in "]})":
            _fail(text, position, f"this {char!r} closes nothing")
        position += 1
    _fail(text, opened, "this '[' is never closed" if not quote else f"a {quote} after it is never closed")


def _skip_spaces(text: str, position: int) -> int:
    while position < len(text) and text[position] == " ":
        position += 1
    return position


def _fail(text: str, position: int, problem: str) -> NoReturn:
    raise CompositionError(
        f"composition {text!r}: {problem} (character {position + 1})\n    {text}\n    {' ' * position}^"
    )
