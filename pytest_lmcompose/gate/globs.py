"""Globs in thresholds: what they match and can match. Only * and ? are special. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache

from interventions.names import near_names
from pytest_lmcompose.composition import BASE, CompositionError, parse


@lru_cache(maxsize=2**16)  # asked for every gate, composition and metric of a run
def matches(glob: str, text: str) -> bool:
    """Return whether `glob` matches the whole of `text`."""
    return re.fullmatch(_pattern(glob), text) is not None


def specificity(glob: str) -> tuple[bool, int]:
    """Return the rank of a glob among those that match the same text: plain text first, then literal characters."""
    literal = sum(char not in "*?" for char in glob)
    return literal == len(glob), literal


@lru_cache(maxsize=2**12)
def overlap(one: str, other: str) -> bool:
    """Return whether two globs can match the same text."""
    if not one or not other:
        return not (one + other).strip("*")
    if one[0] == "*":
        return overlap(one[1:], other) or overlap(one, other[1:])
    if other[0] == "*":
        return overlap(one, other[1:]) or overlap(one[1:], other)
    return (one[0] == other[0] or "?" in (one[0], other[0])) and overlap(one[1:], other[1:])


def impossible(glob: str, methods: Collection[str]) -> str | None:
    """Return why `glob` can match no composition of `methods`, None if it can."""
    if not set(glob) & set("*?"):
        try:
            names = [step.method for step in parse(glob).steps]
        except CompositionError as error:
            return f"not a composition: {' '.join(str(error).split())}"
        unknown = [name for name in names if name not in methods]
    else:
        if (problem := _brackets(glob)) is not None:
            return problem
        unknown = [part for part in _parts(glob) if not _fits(part, (*methods, BASE))]
    if not unknown:
        return None
    hint = near_names(unknown[0].strip("*?"), methods)
    return f"no method matches {unknown[0]!r}.{hint} Known: {', '.join(sorted(methods))}"


def _pattern(glob: str) -> str:
    return "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in glob)


def _brackets(glob: str) -> str | None:
    """Return what is wrong with the brackets in a glob, None if nothing; a * may stand for a bracket."""
    inside = False
    for i, char in enumerate(glob):
        if (char == "[" and inside) or (char == "]" and not inside and "*" not in glob[:i]):
            return f"unexpected bracket at character {i + 1}"
        if char in "[]":
            inside = char == "["
    return "a bracket is not closed" if inside and "*" not in glob[glob.rindex("[") :] else None


def _parts(glob: str) -> Iterator[str]:
    """Yield the part of a glob for each method's name, without settings."""
    bare = re.sub(r"\[[^\]]*(\]|$)|^[^\[]*\]", "*", glob)
    yield from (part for part in bare.split("+") if part.strip("*?"))


def _fits(part: str, names: Collection[str]) -> bool:
    """Return whether methods match a part; a * may span several: "m*q" also matches memit+awq."""
    first, *others = part.split("*")
    if not others:
        return any(re.fullmatch(_pattern(first), name) for name in names)
    *middle, last = others
    patterns = [f"{_pattern(first)}.*", *(f".*{_pattern(piece)}.*" for piece in middle), f".*{_pattern(last)}"]
    return all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns)
