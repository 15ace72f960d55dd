"""One composition's result as plain data: how it travels from a worker, and stands in the report.

JSON has no NaN: a number that is not finite becomes null, and a measurement says which it was in
`nonfinite`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interventions.registry import find_method
from pytest_lmcompose.gates.repeats import Repeat, find

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from evaluators.measurement import Measurement
    from pytest_lmcompose.gates.gate import Verdict
    from pytest_lmcompose.result import Result
    from pytest_lmcompose.steps import StepRecord

Record = Mapping[str, Any]
"""Of a composition, as plain data."""
Measured = Mapping[str, Any]
"""A measurement, or one of its repeats, as plain data."""
_OF_A_REPEAT = ("value", "nonfinite", "stderr", "n", "samples", "weights", "clusters", "answers")


def encode(result: Result, model: dict[str, Any] | None) -> str:
    """Return one JSON string, which survives the crash of the worker that sends it."""
    found = {"model": model, "composition": record(result)}
    try:
        return json.dumps(found, allow_nan=False)
    except ValueError:  # a number that is not finite: few results have one, and looking for it costs more than the rest
        return json.dumps(plain(found), allow_nan=False)


def decode(text: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the model's facts and the composition's record."""
    document = json.loads(text)
    return document["model"], document["composition"]


def record(result: Result) -> dict[str, Any]:
    """Return the record of a composition."""
    composition = result.composition
    found: dict[str, Any] = {
        "id": composition.id,
        "requested": [str(step) for step in composition.steps],
        "executed": [str(step.step) for step in result.steps],
        "status": result.status,
        "error": result.error,
        "state_hash": result.state_hash,
        "steps": [_step(step) for step in result.steps],
        "evaluate_seconds": result.evaluate_seconds,
        "measurements": [_measurement(m, result.repeats) for m in result.measurements or ()],
        "gates": [_verdict(verdict) for verdict in result.gates or ()],
    }
    if result.data is not None:
        found["data"] = result.data
    if len(result.repeats) > 1:
        found["repeats"] = [
            {"seed": r.seed, "state_hash": r.state_hash, "evaluate_seconds": r.evaluate_seconds} for r in result.repeats
        ]
    return found


def settle(records: Iterable[dict[str, Any]], *, part: bool = False) -> list[str]:
    """Judge the paired gates of all records together, in place; return what fails only now.

    Some of them were judged before all were known; see `gate.settle`. In a part of a run, those of the
    other parts stay counted.
    """
    from pytest_lmcompose.gates.gate import settle as settle_gates

    found = list(records)
    if not any(gate.get("paired") for record in found for gate in record["gates"]):
        return []
    verdicts = {r["id"]: tuple(_read_verdict(gate) for gate in r["gates"]) for r in found}
    late = []
    planned = max(v.paired.gates for group in verdicts.values() for v in group if v.paired) if part else 0
    for name, group in settle_gates(verdicts, planned).items():
        late += [v.message for v, before in zip(group, verdicts[name], strict=True) if before.passed and not v.passed]
        verdicts[name] = group
    for record in found:
        record["gates"] = plain([_verdict(verdict) for verdict in verdicts[record["id"]]])
    return late


def by_metric(record: Record) -> dict[str, Measured]:
    """Return the measurements of a record by their metric."""
    return {m["metric"]: m for m in record["measurements"]}


def runs_of(measurement: Measured) -> Sequence[Measured]:
    """Return the repeats behind a measurement, or itself where there are none."""
    runs: Sequence[Measured] = measurement.get("repeats", [measurement])
    return runs


def clusters_of(measurement: Measured) -> tuple[int, ...]:
    """Return the clusters of a measurement's samples; empty where every sample is its own."""
    return tuple(measurement.get("clusters", ()))


def known_fields(kind: type[DataclassInstance], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `fields` that a dataclass has: a report of a later version may have more."""
    return {field.name: fields[field.name] for field in dataclasses.fields(kind) if field.name in fields}


def plain(value: Any) -> Any:
    """Return `value` with null for every number that is not finite."""
    if isinstance(value, float):  # as most values of a report are
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _step(step: StepRecord) -> dict[str, Any]:
    report = step.report
    return {
        "id": str(step.step),
        "method": report.method,
        "category": find_method(report.method).category,
        "settings": report.settings,
        "seed": step.seed,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "changed_parameters": len(report.changed),
        "changed": list(report.changed),
        "details": report.details,
        "warnings": list(report.warnings),
    }


def _measurement(measurement: Measurement, repeats: Sequence[Repeat]) -> dict[str, Any]:
    fields = _fields(measurement)
    if len(repeats) > 1:
        runs = [(repeat.seed, find(repeat.measurements, measurement.metric)) for repeat in repeats]
        fields["repeats"] = [
            {"seed": seed, **{key: value for key, value in _fields(run).items() if key in _OF_A_REPEAT}}
            for seed, run in runs
            if run is not None
        ]
    return fields


def _fields(measurement: Measurement) -> dict[str, Any]:
    fields = dict(vars(measurement))  # `asdict` would copy each of thousands of samples
    if not math.isfinite(measurement.value):
        fields["nonfinite"] = str(measurement.value)
    for name in ("weights", "clusters", "answers"):
        if not fields[name]:
            del fields[name]
    return fields


def _verdict(verdict: Verdict) -> dict[str, Any]:
    fields = dict(vars(verdict))
    if verdict.paired is None:
        del fields["paired"]
    else:
        fields["paired"] = dict(vars(verdict.paired))
    return fields


def _read_verdict(fields: dict[str, Any]) -> Verdict:
    """Return the verdict that `_verdict` made plain."""
    from pytest_lmcompose.gates.gate import Verdict
    from pytest_lmcompose.gates.paired import Paired

    paired = fields.get("paired")
    known = known_fields(Verdict, fields)
    return Verdict(**{**known, "paired": None if paired is None else Paired(**known_fields(Paired, paired))})
