"""One composition's result as plain data: how it travels from a worker, and stands in the report.

JSON has no NaN: a number that is not finite becomes null, and a measurement says which it was in
`nonfinite`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from interventions.registry import find_method

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.build import StepRecord
    from pytest_lmcompose.gate import Verdict
    from pytest_lmcompose.run import Result

PROPERTY = "lmcompose"
"""Name of the user property of a test's report."""


def encode(result: Result, model: dict[str, Any] | None) -> str:
    """Return one JSON string, which survives the crash of the worker that sends it."""
    return json.dumps({"model": model, "composition": plain(record(result))}, allow_nan=False)


def decode(text: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the model's facts and the composition's record."""
    document = json.loads(text)
    return document["model"], document["composition"]


def record(result: Result) -> dict[str, Any]:
    """Return the record of a composition."""
    composition = result.composition
    measured = result.measurements
    return {
        "id": composition.id,
        "requested": [str(step) for step in composition.steps],
        "executed": [str(step.step) for step in result.steps],
        "status": result.status,
        "error": result.error,
        "state_hash": result.state_hash,
        "steps": [_step(step) for step in result.steps],
        "evaluate_seconds": result.evaluate_seconds,
        "measurements": [_measurement(m) for m in measured or ()],
        "gates": [_verdict(verdict) for verdict in result.gates or ()],
    }


def plain(value: Any) -> Any:
    """Return `value` with null for every number that is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
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


def _measurement(measurement: Measurement) -> dict[str, Any]:
    fields = dataclasses.asdict(measurement)
    if not math.isfinite(measurement.value):
        fields["nonfinite"] = str(measurement.value)
    return fields


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return dataclasses.asdict(verdict)
