"""Compositions and their ids: `memit+awq`, `awq[bits=3]+memit`, or `base` without any step.

    id      = "base" | step ("+" step)*
    step    = method [ "[" setting ("," setting)* "]" ]
    setting = key "=" value

A value is text in Hydra's override grammar (`3`, `[2,3]`, `{a: 1}`, `'quoted'`), so commas and brackets in a value must
be nested or quoted. Settings are sorted by key, so that one state of the model has one id. Imports no torch.
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
    """An invalid composition id; the message marks the position."""


@dataclass(frozen=True, order=True)
class Step:
    """One application of a method, with the settings that this step overrides."""

    method: str
    settings: tuple[tuple[str, str], ...] = ()
    """(key, value text), sorted by key."""

    def __post_init__(self) -> None:
        """Sort the settings; reject a duplicate key."""
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
        """The canonical id, which `parse` can read."""
        return "+".join(map(str, self.steps)) or BASE

    def prefixes(self) -> tuple[Composition, ...]:
        """Return the compositions of the first 1, 2, ... steps, up to this one."""
        return tuple(Composition(self.steps[:k]) for k in range(1, len(self.steps) + 1))


@lru_cache(maxsize=2**14)  # gates and reports parse the same ids again
def parse(text: str) -> Composition:
    """Read a composition id; raises CompositionError, which marks the position of the error."""
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
    """Return every ordered choice of 1 to `max_steps` distinct `steps`; with `category`, at most one per category."""
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
        _fail(text, position, f"{BASE!r} takes no steps: it is the model without any")
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
    """Read `key=value`; return both with the position of the next ',' or ']'."""
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
            _fail(text, position, f"this {char!r} has no opening bracket")
        position += 1
    _fail(text, opened, "this '[' is never closed" if not quote else f"a {quote} after this '[' is never closed")


def _skip_spaces(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip(" "))


def _fail(text: str, position: int, problem: str) -> NoReturn:
    raise CompositionError(
        f"composition {text!r}: {problem} (character {position + 1})\n    {text}\n    {' ' * position}^"
    )
