"""Report documents for tests, made without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from evaluators.measurement import Measurement
from pytest_lmcompose.results import SCHEMA_MINOR, SCHEMA_VERSION, CompositionResult, Measured, Report, encode

Samples = Mapping[str, Sequence[float]]
"""By metric; those of `accuracy/hazardous` and perplexities are better low."""


def typed(document: Mapping[str, Any]) -> Report:
    """Return a report document as the record that it is read as."""
    return msgspec.convert(document, Report)


def typed_record(document: Mapping[str, Any]) -> CompositionResult:
    """Return the plain record of a composition as the type that it is read as."""
    return msgspec.convert(document, CompositionResult)


def plain(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as a report has it."""
    found: dict[str, Any] = json.loads(encode(Measured.of(measurement)))
    return found


def step(name: str, category: str) -> dict[str, Any]:
    """Return a step as a report has it."""
    numbers = {"seed": 7, "seconds": 1.0, "peak_memory_bytes": 1, "changed_parameters": 1}
    texts: dict[str, Any] = {"settings": {}, "changed": ["weight"], "details": {}, "warnings": []}
    return {"id": name, "method": name.partition("[")[0], "category": category, **numbers, **texts}


def gate(metric: str, *, passed: bool = True) -> dict[str, Any]:
    """Return a gate of a metric as a report has it."""
    numbers = {"threshold": 0.5, "value": 1.0, "base_value": None}
    return {"metric": metric, "gate": "min", "passed": passed, "message": "", **numbers}


def measured(metric: str, samples: Sequence[float]) -> dict[str, Any]:
    """Return the mean of `samples` as a report has it."""
    lower = metric.startswith(("accuracy/hazardous", "perplexity"))
    found = Measurement.mean(metric, list(samples), higher_is_better=not lower)
    return measurement(metric, found.value, found.stderr, samples, better=not lower)


def measurement(
    metric: str, value: float, error: float | None, samples: Sequence[float], *, better: bool, note: str = ""
) -> dict[str, Any]:
    """Return a measurement as a report has it, whether or not the samples make its value."""
    return {
        "metric": metric,
        "value": value,
        "stderr": error,
        "n": len(samples),
        "higher_is_better": better,
        "samples": list(samples),
        "note": note,
    }


def composition(name: str, metrics: Samples, **fields: Any) -> dict[str, Any]:
    """Return the record of a composition that was measured, with hashes of what was asked."""
    data = {part: "a" for part in ("edits", "facts", "texts", "questions", "methods")}
    return record(name, [measured(metric, samples) for metric, samples in metrics.items()], data=data) | fields


def record(name: str, measurements: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    """Return the record of a composition that was measured."""
    steps = [] if name == "base" else name.split("+")
    return {
        "id": name,
        "requested": steps,
        "executed": steps,
        "status": "measured",
        "error": None,
        "state_hash": "0" * 64,
        "steps": [],
        "evaluate_seconds": 1.0,
        "measurements": list(measurements),
        "gates": [],
    } | fields


def report(compositions: Mapping[str, Samples], /, **fields: Any) -> dict[str, Any]:
    """Return a report in the schema."""
    return {
        "schema_version": SCHEMA_VERSION,
        "schema_minor": SCHEMA_MINOR,
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T01:00:00+00:00",
        "seed": 0,
        "repeats": 1,
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "machine": "x86_64",
            "cores": 2,
            "packages": {"torch": "2.13.0"},
        },
        "model": {
            "id": "tiny",
            "location": "tiny",
            "revision": None,
            "weight_hash": "1" * 64,
            "architecture": "LlamaForCausalLM, 2 layers of width 32, vocabulary of 300",
            "dtype": "float32",
            "device": "cpu",
            "parameters": 1000,
        },
        "recipe": {"model": {}, "world": {}, "evaluate": {}, "suite": {}},
        "compositions": [composition(name, metrics) for name, metrics in compositions.items()],
        "composability": None,
    } | fields
