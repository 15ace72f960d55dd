"""The records of a run: what is written is read back, what is damaged is refused, the schema is that of the types."""

from __future__ import annotations

import ast
import graphlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pytest_lmcompose
from evaluators.measurement import Measurement
from pytest_lmcompose.report.collect import SCHEMA_PATH
from pytest_lmcompose.results import Measured, Report, ReportError, decode, encode, replace, schema
from tests.plugin.documents import report, typed
from tests.plugin.rich_documents import broken_off, compared, rich

ROOT = Path(pytest_lmcompose.__file__).parent.parent
PACKAGES = ("pytest_lmcompose", "interventions", "evaluators", "compositions")
numbers = st.floats(allow_nan=True, allow_infinity=True)


def test_the_schema_that_is_shipped_is_made_from_the_types() -> None:
    made = json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(made)
    assert json.loads(SCHEMA_PATH.read_text()) == made, "python -m pytest_lmcompose.results > " + str(SCHEMA_PATH)


@pytest.mark.parametrize("make", [rich, compared, broken_off])
def test_what_is_written_is_in_the_schema_and_read_back(make: Any) -> None:
    found = typed(make())
    text = encode(found)
    jsonschema.validate(json.loads(text), schema())
    assert decode(text) == found


def test_what_earlier_versions_lack_has_a_default_and_is_always_written() -> None:
    found = decode(json.dumps(broken_off()))
    assert (found.repeats, found.prompts, found.composability) == (1, (), None)
    written = json.loads(encode(found))
    assert written.keys() >= {"repeats", "composability", "schema_minor"}
    assert "shard" not in written and "merged" not in written


@given(value=numbers, samples=st.lists(numbers, min_size=1, max_size=5))
def test_numbers_that_are_not_finite_survive_as_what_they_were(value: float, samples: list[float]) -> None:
    measured = Measured.of(Measurement("m", value, None, len(samples), True, tuple(samples)))
    one = replace(typed(report({"a": {"m": [1.0]}})).compositions[0], measurements=(measured,))
    text = encode(replace(typed(report({})), compositions=(one,)))
    assert "NaN" not in text and "Infinity" not in text
    back = decode(text).compositions[0].measurements[0].measurement()
    assert back.value == value or (math.isnan(back.value) and math.isnan(value))
    kept = [x if math.isfinite(x) else None for x in samples]
    assert [x if math.isfinite(x) else None for x in back.samples] == kept


def test_a_value_that_contradicts_its_word_is_damage() -> None:
    document = report({"a": {"m": [1.0]}})
    document["compositions"][0]["measurements"][0]["nonfinite"] = "inf"
    with pytest.raises(ReportError, match="'m' in the composition 'a' needs exactly one of value and nonfinite"):
        decode(json.dumps(document))


def test_records_are_frozen() -> None:
    found: Any = typed(report({}))
    with pytest.raises(AttributeError):
        found.status = "interrupted"
    assert isinstance(found, Report)


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a module imports, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_imports_itself_by_way_of_others() -> None:
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for target in imports(path):
            while target and target not in modules:
                target = target.rpartition(".")[0]
            found.add(target)
        graph[name] = found - {"", name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")
