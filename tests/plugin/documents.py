"""Report documents for tests, made without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluators.measurement import Measurement

Samples = Mapping[str, Sequence[float]]
"""By metric; those of `accuracy/hazardous` and perplexities are better low."""


def measured(metric: str, samples: Sequence[float]) -> dict[str, Any]:
    """Return the mean of `samples` as a report has it."""
    lower = metric.startswith(("accuracy/hazardous", "perplexity"))
    found = Measurement.mean(metric, list(samples), higher_is_better=not lower)
    return {
        "metric": metric,
        "value": found.value,
        "stderr": found.stderr,
        "n": found.n,
        "higher_is_better": found.higher_is_better,
        "samples": list(found.samples),
        "note": "",
    }


def composition(name: str, metrics: Samples, **fields: Any) -> dict[str, Any]:
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
        "data": {part: "a" for part in ("edits", "facts", "texts", "questions", "methods")},
        "measurements": [measured(metric, samples) for metric, samples in metrics.items()],
        "gates": [],
    } | fields


def report(compositions: Mapping[str, Samples], /, **fields: Any) -> dict[str, Any]:
    """Return a report in the schema."""
    return {
        "schema_version": 1,
        "schema_minor": 3,
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
