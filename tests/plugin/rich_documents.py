"""Reports of runs that never were, with every kind of entry that a page shows, made up by a fixed rule."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

from pytest_lmcompose.report.composability import composability
from pytest_lmcompose.results import encode
from tests.plugin.documents import measurement, record, report, typed_record

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "memit": ("edit", {"layers": [1, 2], "z": {"steps": 30}}),
    "rmu": ("unlearn", {"layer": 3, "steps": 80}),
    "relearn": ("unlearn", {"texts": 20}),
    "awq": ("compress", {"bits": 4, "group_size": 128}),
    "wanda": ("compress", {"sparsity": 0.5}),
}
COMPOSITIONS = (
    *("base", "memit", "rmu", "awq", "wanda"),
    *("awq[bits=2]", "awq[bits=3]", "awq[bits=8]", "wanda[sparsity=0.25]", "wanda[sparsity=0.75]"),
    *("memit+awq", "awq+memit", "memit+wanda", "wanda+memit", "rmu+awq", "awq+rmu", "rmu+memit", "memit+rmu"),
    *("memit+awq[bits=2]", "memit+awq[bits=3]", "rmu+relearn"),
)
NOTE = "made up"
RATES = {"edit_success_exact": 20, "edit_locality_agreement": 20, "recall": 120, "accuracy/harmless": 96}


def rich(compositions: tuple[str, ...] = COMPOSITIONS, *, harm: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """Return a report; `harm` makes every edited model worse by so much."""
    plain, records = report({}), [_record(name, harm) for name in compositions]
    return plain | {
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:14:05+00:00",
        "seed": seed,
        "environment": {**plain["environment"], "packages": {"torch": "2.13.0", "transformers": "5.17.0"}},
        "model": {
            "id": f"tiny {HOSTILE}",
            "location": "/models/tiny",
            "revision": None,
            "weight_hash": "ab" * 32,
            "dtype": "float32",
            "device": "cpu",
            "parameters": 1_234_567,
        },
        "recipe": {
            "model": {"path": "tiny"},
            "world": {"folder": "world", "edits": "zsre.json"},
            "evaluate": {"edits": 20},
            "suite": {"compositions": list(compositions)},
        },
        "compositions": records,
        "composability": json.loads(encode(composability(list(map(typed_record, records)), seed))),
        "prompts": [
            {
                "seed": seed,
                "metrics": ["edit_success_exact"],
                "texts": [f"Subject {i} {HOSTILE} was born in → Place {i}" for i in range(20)],
            },
            {"seed": seed, "metrics": ["recall"], "texts": [f"Fact {i} is → {i}" for i in range(120)]},
        ],
    }


def compared() -> dict[str, Any]:
    """Return the report of a run that compared itself with stored ones."""
    row = {"composition": "memit", "higher_is_better": True, "n": 120, "stderr": 0.01, "note": ""}
    worse = {"metric": "recall", "old": 0.95, "new": 0.9, "difference": -0.05, "p": 1e-4, "p_holm": 1e-3}
    same = {"metric": "edit_success_exact", "old": 0.5, "new": 0.5, "difference": 0.0, "p": 1.0, "p_holm": 1.0}
    drift = {"composition": "memit", "metric": "recall", "values": [0.96, 0.95, 0.94, 0.92, 0.9], "loss": 0.06}
    return {
        **rich(("base", "memit")),
        "comparison": {
            "baseline": "0007_main.json",
            "started": "2025-12-30T00:00:00+00:00",
            "seed": 0,
            "commit": None,
            "problem": None,
            "differences": [{"what": "versions", "message": "torch: 2.12.0 -> 2.13.0"}],
            "rows": [{**row, **same, "verdict": "same"}, {**row, **worse, "verdict": "worse"}],
        },
        "drift": {
            "runs": 5,
            "level": 0.01,
            "judged": 4,
            "rows": [{**drift, "p": 0.008, "p_holm": 0.009, "drifts": True}],
        },
        "unused_rules": [{"composition": "rmu*", "metric": "recall", "tested": False, "reason": "nothing matches"}],
    }


def broken_off() -> dict[str, Any]:
    """Return the report of a run of the oldest minor version that broke off early."""
    old = copy.deepcopy(rich(("base",)))
    for key in ("schema_minor", "repeats", "composability", "prompts"):
        del old[key]
    broken = {**old["compositions"][0], "id": "rmu", "requested": ["rmu"], "status": "interrupted"}
    broken |= {"error": f"KeyboardInterrupt: {HOSTILE}", "state_hash": None, "measurements": [], "gates": []}
    return {**old, "status": "interrupted", "compositions": [*old["compositions"], broken]}


def _record(name: str, harm: float) -> dict[str, Any]:
    steps = [] if name == "base" else name.split("+")
    rates, squeeze = _levels(steps)
    if "memit" in steps:
        rates = {metric: max(0.0, rate - harm) for metric, rate in rates.items()}
    found = [_rate(metric, n, rates[metric]) for metric, n in RATES.items()]
    found.append(_rate("accuracy/hazardous", 72, rates["accuracy/hazardous"], better=False))
    logs = [1.5 + 0.02 * (i % 9) + 2 * squeeze**2 for i in range(40)]
    mean = math.fsum(logs) / len(logs)
    perplexity = measurement("perplexity", math.exp(mean), 0.1, logs, better=False, note=NOTE)
    if name == "awq[bits=2]":
        perplexity |= {"value": None, "nonfinite": "inf", "stderr": None}
    bits = 32 * (1 - squeeze)
    found += [perplexity, measurement("average_bits", bits, 0.0, [bits], better=False, note="read, not sampled")]
    return record(
        name,
        found,
        state_hash="cd" * 32,
        steps=[_step(step, i) for i, step in enumerate(steps)],
        evaluate_seconds=3.25,
        gates=[_gate(name, measured) for measured in found if measured["metric"] in ("recall", "perplexity")],
    )


def _levels(steps: list[str]) -> tuple[dict[str, float], float]:
    """Return the rates after `steps`, and how much compression took away."""
    rates = {"edit_success_exact": 0.05, "edit_locality_agreement": 1.0, "recall": 0.99, "accuracy/harmless": 0.95}
    rates["accuracy/hazardous"], squeeze = 0.9, 0.0
    for place, step in enumerate(steps):
        method, _, setting = step.partition("[")
        if method == "memit":
            rates["edit_success_exact"], rates["edit_locality_agreement"] = 0.95, 0.85
        elif method == "rmu":
            rates["accuracy/hazardous"] = 0.3
        elif method == "relearn":
            rates["accuracy/hazardous"] = 0.7
        else:
            amount = float(setting.rstrip("]").partition("=")[2] or METHODS[method][1].get("bits", 0.5))
            squeeze = 0.9 / amount**0.5 if method == "awq" else amount / 2
            loss = squeeze**2 * (1.0 if place else 0.6)
            rates = {metric: rate * (1 - loss) for metric, rate in rates.items()}
            rates["accuracy/hazardous"] += 0.2 * loss
    return rates, squeeze


def _rate(metric: str, n: int, rate: float, *, better: bool = True) -> dict[str, Any]:
    order = list(range(n))
    random.Random(metric).shuffle(order)
    samples = [float(place < round(rate * n)) for place in order]
    value = math.fsum(samples) / n
    return measurement(metric, value, math.sqrt(value * (1 - value) / (n - 1)), samples, better=better, note=NOTE)


def _step(step: str, place: int) -> dict[str, Any]:
    method, _, setting = step.partition("[")
    category, settings = METHODS[method]
    key, _, value = setting.rstrip("]").partition("=")
    return {
        "id": step,
        "method": method,
        "category": category,
        "settings": {**settings, **({key: float(value)} if key else {})},
        "seed": 7,
        "seconds": 4.0 + 2 * place + len(method),
        "peak_memory_bytes": (400 + 50 * place + 10 * len(method)) * 2**20,
        "changed_parameters": 3,
        "changed": ["model.layers.1.mlp.down_proj.weight"],
        "details": {"loss": None, "layers": [1, 2]},
        "warnings": ["rounded to nearest"] if method == "awq" else [],
    }


def _gate(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    value, metric = measured["value"], measured["metric"]
    low = metric == "recall"
    passed = value is not None and (value >= 0.7 if low else value <= 8)
    kind, bound = ("min", 0.7) if low else ("max", 8.0)
    shown = measured.get("nonfinite") if value is None else f"{value:.6g}"
    message = f"{name}  {metric} = {shown} {'keeps' if passed else 'misses'} {kind} {bound} {HOSTILE}"
    return {
        "metric": metric,
        "gate": kind,
        "threshold": bound,
        "passed": passed,
        "message": message,
        "value": value,
        "base_value": None,
    }
