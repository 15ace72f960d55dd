"""Read the data files of a world, and select the edits of a run. Imports no torch.

Errors name the file, the record and the field.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from evaluators.data import EditCase

T = TypeVar("T")


class WorldError(ValueError):
    """Invalid data; the message names the file, the record and the field."""


class Record:
    """A JSON object with its position in a file, for errors."""

    def __init__(self, path: Path | str, number: int, data: Any, at: str = "") -> None:
        self.path, self.number, self.data, self.at = path, number, data, at
        if not isinstance(data, dict):
            raise self.error(f"expected an object{f' in {at!r}' if at else ''}, found {type(data).__name__}")

    def text(self, key: str, *, empty: bool = False) -> str:
        """Return a stripped text; it must not be empty unless `empty`."""
        value = self.raw_text(key)
        if not empty and not value.strip():
            raise self.error(f"field {self._name(key)!r} is empty")
        return value.strip()

    def raw_text(self, key: str) -> str:
        """Return a text as it stands, empty or not."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self.error(f"field {self._name(key)!r} is {type(value).__name__}, expected text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return one or several texts, each once, without the spaces around them; none of them is empty."""
        value = self._get(key)
        if not isinstance(value, list):
            return (self.text(key),)
        if not all(isinstance(item, str) for item in value):
            raise self.error(f"field {self._name(key)!r} is not a list of texts")
        return tuple(dict.fromkeys(text for item in value if (text := item.strip())))

    def items(self, key: str) -> list[Any]:
        """Return a list."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self.error(f"field {self._name(key)!r} is {type(value).__name__}, expected a list")
        return value

    def child(self, key: str) -> Record:
        """Return a nested object."""
        return Record(self.path, self.number, self._get(key), self._name(key))

    def children(self, key: str) -> list[Record]:
        """Return a list of nested objects."""
        return [
            Record(self.path, self.number, item, f"{self._name(key)}[{i}]") for i, item in enumerate(self.items(key))
        ]

    def error(self, problem: str) -> WorldError:
        """Return an error that names the file and the record."""
        return WorldError(f"{self.path}, record {self.number}: {problem}")

    def _get(self, key: str) -> Any:
        if key not in self.data:
            raise self.error(f"field {self._name(key)!r} is missing; it has {', '.join(map(str, self.data))}")
        return self.data[key]

    def _name(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key


def select_edits(records: Sequence[EditCase], n: int, seed: int, source: str = "") -> tuple[EditCase, ...]:
    """Select `n` random edits with distinct subjects, whose locality prompts mention no other edited subject.

    The same seed gives the same edits; a smaller `n` gives the first of them. Raises WorldError, which names `source`,
    if there are too few.
    """
    order = list(range(len(records)))
    random.Random(f"edits {seed}").shuffle(order)
    chosen: list[EditCase] = []
    for index in order:
        if len(chosen) == n:
            break
        record = records[index]
        if not any(_clash(record, other) for other in chosen):
            chosen.append(record)
    if len(chosen) < n:
        raise WorldError(
            f"{source}: only {len(chosen)} of {len(records)} edits have distinct subjects and locality "
            f"prompts, but {n} are needed; lower evaluate.edits"
        )
    return tuple(chosen)


def sample(items: Sequence[T], n: int | None, seed: int, purpose: str) -> list[T]:
    """Return `n` random items in their original order, or all of them."""
    if n is None or n >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(f"{purpose} {seed}").sample(range(len(items)), n))]


def mentions(text: str, subject: str) -> bool:
    """Return whether `text` mentions `subject`, ignoring case."""
    return subject.casefold() in text.casefold()


def _clash(one: EditCase, other: EditCase) -> bool:
    if one.subject.casefold() == other.subject.casefold():
        return True
    return any(mentions(probe.prompt, b.subject) for a, b in ((one, other), (other, one)) for probe in a.locality)
