"""Whether a document is a report: its JSON Schema, and what no schema can say. Needs no library of schemas."""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_lmcompose.composition import CompositionError, parse
from pytest_lmcompose.report.json import SCHEMA_MINOR, SCHEMA_PATH

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "number": "a number",
    "integer": "a whole number",
}
_SHOWN = 40
"""Characters of a value that a message shows."""


def problem_of(document: Any) -> str | None:
    """Say what is wrong with a report, first of all its place; None: nothing.

    Properties that the schema does not know are left alone, and so are new words in a report of a later minor
    version.
    """
    schema = _schema()
    later = isinstance(document, dict) and (_minor(document) > SCHEMA_MINOR)
    problem = next(_Check(schema, words=not later).check(document, schema, "the report"), None)
    return next(_contradictions(document), None) if problem is None else problem


class _Check:
    """Holds values against the part of JSON Schema that the schema of reports uses."""

    def __init__(self, root: Mapping[str, Any], *, words: bool) -> None:
        self._root = root
        self._words = words
        """Whether a text must be one that the schema lists."""

    def check(self, value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
        """Yield what is wrong with `value`, which stands at `place`."""
        if "$ref" in schema:
            schema = self._found(schema["$ref"])
        if "anyOf" in schema:
            yield from self._any(value, schema["anyOf"], place)
            return
        types = schema.get("type", ())
        types = (types,) if isinstance(types, str) else types
        if types and not any(_is(value, name) for name in types):
            yield f"{place} is {_shown(value)}, expected {' or '.join(_NAMES.get(name, name) for name in types)}"
            return
        if "const" in schema and value != schema["const"]:
            yield f"{place} is {_shown(value)}, expected {schema['const']}"
        elif "enum" in schema and (self._words or not isinstance(value, str)) and value not in schema["enum"]:
            yield f"{place} is {_shown(value)}, expected one of {', '.join(map(str, schema['enum']))}"
        elif isinstance(value, str):
            yield from _text(value, schema, place)
        elif isinstance(value, dict):
            yield from self._mapping(value, schema, place)
        elif isinstance(value, list):
            yield from self._list(value, schema, place)
        elif value is not None and not isinstance(value, bool):
            yield from _number(value, schema, place)

    def _found(self, reference: str) -> Mapping[str, Any]:
        found: Any = self._root
        for key in reference.removeprefix("#/").split("/"):
            found = found[key]
        return found  # type: ignore[no-any-return]

    def _any(self, value: Any, schemas: list[Mapping[str, Any]], place: str) -> Iterator[str]:
        problems = [next(self.check(value, schema, place), None) for schema in schemas]
        if None not in problems:  # the last says most: null comes first where it is allowed
            yield str(problems[-1])

    def _mapping(self, value: Mapping[str, Any], schema: Mapping[str, Any], place: str) -> Iterator[str]:
        if missing := [key for key in schema.get("required", ()) if key not in value]:
            yield f"{place} lacks {', '.join(missing)}"
            return
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            yield from _text(key, {}, f"a key of {place}")
            inner = known.get(key, others if isinstance(others, dict) else {})
            yield from self.check(item, inner, f"{key} of {place}" if place != "the report" else key)

    def _list(self, value: list[Any], schema: Mapping[str, Any], place: str) -> Iterator[str]:
        if len(value) < schema.get("minItems", 0):
            yield f"{place} has {len(value)} entries, expected {schema['minItems']} or more"
        for i, item in enumerate(value, start=1):
            yield from self.check(item, schema.get("items", {}), f"entry {i} of {place}")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _text(value: str, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
        yield f"{place} holds half a character: {value[:_SHOWN]!a}"
    elif "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{place} is {_shown(value)}, expected what matches {schema['pattern']}"
    elif schema.get("format") == "date-time" and not _is_time(value):
        yield f"{place} is {_shown(value)}, expected a time such as 2026-01-01T12:00:00+00:00"


def _number(value: int | float, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        yield f"{place} is too large or no number"
    elif value < schema.get("minimum", value) or value > schema.get("maximum", value):
        low, high = schema.get("minimum"), schema.get("maximum")
        yield f"{place} is {value}, expected a number from {low} up" + ("" if high is None else f" to {high}")


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what readers take for granted and a schema cannot say."""
    yield from _twice((record["id"] for record in document["compositions"]), "two records of the composition {}")
    composed = document.get("composability")
    steps = [step["step"] for e in (() if composed is None else composed["interference"]) for step in e["steps"]]
    for record in document["compositions"]:
        steps += record["requested"]
    for text in (*(document.get("plan") or {}).get("compositions", ()), *steps):
        try:
            parse(text)
        except CompositionError:
            yield f"{_shown(text)} is no composition"
    for record in document["compositions"]:
        name = f"the composition {_shown(record['id'])}"
        yield from _twice((m["metric"] for m in record["measurements"]), f"two measurements of {{}} in {name}")
        for measured in record["measurements"]:
            for run in (measured, *measured.get("repeats", ())):
                for key in ("weights", "clusters"):
                    if key in run and len(run[key]) != len(run["samples"]):
                        counted = f"{len(run[key])} {key} for {len(run['samples'])} samples"
                        yield f"{counted} of {_shown(measured['metric'])} in {name}"
            if "repeats" in measured and not measured["repeats"]:
                yield f"no repeats of {_shown(measured['metric'])} in {name}"
        for gate in record["gates"]:
            if "paired" in gate and None in (gate["threshold"], gate["value"], gate["base_value"]):
                yield f"a paired gate of {_shown(gate['metric'])} in {name} without its numbers"
    for entry in () if composed is None else composed["interference"]:
        for step in entry["steps"]:
            for key in ("change", "stderr"):
                if step[key] is not None and len(step[key]) != len(entry["metrics"]):
                    yield f"{len(step[key])} numbers of {key} for {len(entry['metrics'])} metrics of interference"
            if (step["change"] is None) != (step["stderr"] is None):
                yield "interference with a change or an error alone"
    shard = document.get("shard")
    if shard is not None and shard["index"] > shard["count"]:
        yield f"shard {shard['index']} of {shard['count']}"


def _twice(names: Iterator[str], said: str) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield said.format(_shown(name))
        seen.add(name)


def _is_time(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        return "a number of very many digits"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _minor(document: Mapping[str, Any]) -> int:
    minor = document.get("schema_minor", 0)
    return minor if isinstance(minor, int) else 0


@functools.cache
def _schema() -> Mapping[str, Any]:
    return json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
