"""Survival, return, interference and intervals in the report, from records written by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import msgspec
import pytest

from evaluators.measurement import Measurement
from pytest_lmcompose.gate.repeats import pooled
from pytest_lmcompose.report.collect import SCHEMA_PATH
from pytest_lmcompose.report.composability import composability
from pytest_lmcompose.report.sections import interference_rows, share_rows
from pytest_lmcompose.results import Composability, encode
from tests.plugin import documents

CATEGORIES = {"memit": "edit", "rmu": "unlearn", "awq": "compress"}
HAZARD, SUCCESS = "accuracy/hazardous", "edit_success_exact"


def record(name: str, **samples: list[float]) -> dict[str, Any]:
    """Return a record with the metrics named; `hazard` and `success` stand for those above."""
    steps = [] if name == "base" else name.split("+")
    full = {"hazard": HAZARD, "success": SUCCESS}
    found = [
        Measurement.mean(full.get(metric, metric), values, higher_is_better=metric != "hazard")
        for metric, values in samples.items()
    ]
    return documents.record(
        name,
        list(map(documents.plain, found)),
        steps=[documents.step(step, CATEGORIES[step]) for step in steps],
    )


def found(*records: dict[str, Any]) -> dict[str, Any]:
    """Return the composability section, held to its schema."""
    section: dict[str, Any] = json.loads(encode(composability([documents.typed_record(r) for r in records], 0)))
    schema = json.loads(SCHEMA_PATH.read_text())
    jsonschema.validate(section, {"$ref": "#/$defs/Composability", "$defs": schema["$defs"]})
    return section


RECORDS = [
    record("base", hazard=[1, 1, 1, 1], success=[0, 0], recall=[1, 1]),
    record("rmu", hazard=[0, 0, 1, 0], success=[0, 0], recall=[1, 1]),
    record("rmu+memit", hazard=[0, 0, 1, 0], success=[1, 1], recall=[1, 0]),
    record("rmu+memit+awq", hazard=[1, 0, 1, 0], success=[1, 0], recall=[1, 0]),
]


def test_what_survived_and_what_came_back() -> None:
    section = found(*RECORDS)
    (survival,) = section["survival"]
    assert (survival["composition"], survival["step"], survival["prefix"]) == ("rmu+memit+awq", "memit", "rmu+memit")
    assert (survival["metric"], survival["value"], survival["n"]) == (SUCCESS, 0.5, 2)
    assert survival["stderr"] == pytest.approx(0.5)
    back = {entry["composition"]: entry for entry in section["returned"]}
    assert {name: entry["value"] for name, entry in back.items()} == {
        "rmu+memit": 0,
        "rmu+memit+awq": pytest.approx(1 / 3),
    }
    assert all((entry["step"], entry["prefix"], entry["metric"]) == ("rmu", "rmu", HAZARD) for entry in back.values())
    assert [
        [cell.text for cell in row]
        for row in share_rows(msgspec.convert(section, Composability).survival, [SUCCESS, "recall"])
    ] == [
        ["composition", SUCCESS],
        ["rmu+memit+awq  since rmu+memit", "0.500 ±0.500"],
    ]


def test_a_state_that_was_not_measured_leaves_its_share_out() -> None:
    without_base = found(*RECORDS[1:])
    assert without_base["returned"] == [] and len(without_base["survival"]) == 1
    without_prefix = found(RECORDS[0], RECORDS[1], RECORDS[3])
    assert without_prefix["survival"] == [] and len(without_prefix["returned"]) == 1


def test_a_share_of_nothing_is_null_and_says_why() -> None:
    section = found(
        record("base", hazard=[0, 1]),
        record("rmu", hazard=[0, 1]),
        record("rmu+awq", hazard=[1, 1]),
        record("memit", success=[1, math.nan]),
        record("memit+awq", success=[1, 1]),
    )
    (back,), (kept,) = section["returned"], section["survival"]
    assert back["value"] is None and "removed nothing" in back["note"]
    assert kept["value"] is None and kept["note"] == "not finite in some state"


def test_the_matrix_shows_what_the_steps_promise() -> None:
    metrics = [SUCCESS, "edit_success_f1", HAZARD, "recall", "perplexity"]

    def columns(*names: str) -> list[str]:
        values = {"hazard": [0.0, 1.0], "success": [0.0, 1.0], "edit_success_f1": [0.0, 1.0], "recall": [1.0, 1.0]}
        section = found(*(record(name, **values) for name in names))
        assert set(section["interference"][0]["metrics"]) == set(metrics) - {"perplexity"}  # all that was measured
        return [cell.text for cell in interference_rows(msgspec.convert(section, Composability), metrics)[0]]

    assert columns("memit", "memit+awq") == ["composition", SUCCESS, "recall"]
    assert columns("awq", "awq+rmu") == ["composition", HAZARD, "recall"]
    assert columns("awq", "awq+rmu", "awq+rmu+memit") == ["composition", SUCCESS, HAZARD, "recall"]


def test_prompts_of_one_edit_make_no_interval_narrower() -> None:
    one, other = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    prompts = [i for i in range(6) for _ in range(5)]

    def section(copies: bool, clusters: list[int] | None) -> dict[str, Any]:
        states = {"memit": [1.0] * 6, "memit+awq": one, "awq+memit": other}
        records = []
        for name, samples in states.items():
            values = [samples[i] for i in prompts] if copies else samples
            made = record(name)
            made["measurements"] = [documents.plain(Measurement.mean(SUCCESS, values, clusters=clusters))]
            records.append(made)
        return found(*records)

    def width(section: dict[str, Any]) -> float:
        (entry,) = section["orders"]
        return float(entry["order_sensitivity"]["high"] - entry["order_sensitivity"]["low"])

    alone, grouped, ungrouped = section(False, None), section(True, prompts), section(True, None)
    assert width(grouped) == pytest.approx(width(alone))  # drawn alike, as the seed is the same
    assert width(ungrouped) < 0.7 * width(alone)
    error, same, less = (s["interference"][0]["steps"][0]["stderr"][0] for s in (alone, grouped, ungrouped))
    assert same == pytest.approx(error) and less < 0.5 * error
    assert grouped["survival"][0]["stderr"] == pytest.approx(alone["survival"][0]["stderr"])


def test_repeats_keep_their_clusters_apart() -> None:
    def run(seed: int, clusters: list[int] | None) -> Measurement:
        return Measurement.mean("m", [float((i + seed) % 3 == 0) for i in range(4)], clusters=clusters)

    (both,) = pooled([[run(0, [0, 0, 1, 1])], [run(1, None)]])
    assert both.clusters == (0, 0, 1, 1, 2, 3, 4, 5)
    assert pooled([[run(0, None)], [run(1, None)]])[0].clusters == ()
    pairs = [0, 0, 1, 1]
    (grouped,) = pooled([[run(0, pairs)], [run(0, pairs)]])
    assert grouped.stderr == pytest.approx(run(0, pairs).stderr)  # the same questions twice tell nothing new
