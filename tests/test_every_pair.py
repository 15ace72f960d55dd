"""Every ordered pair of methods on the embedded model, with few updates each: all of them run, and report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from interventions.registry import methods
from tests.started import run_pytest

ROOT = Path(__file__).parents[1]
SHORT = (
    "evaluate=quick",
    *(f"{method}.z.steps=3" for method in ("memit", "rome", "alphaedit", "emmet", "pmet")),
    *(f"{method}.steps=3" for method in ("ft", "lora")),
    *(
        f"{method}.max_updates=3"
        for method in ("ga", "gd", "npo", "simnpo", "wga", "satimp", "undial", "jensun", "quail")
    ),
    "rmu.max_num_batches=4",
    "sft.max_updates=3",
    "dpo.max_updates=3",
    *(f"{method}.samples=16" for method in ("gptq", "awq", "wanda", "sparsegpt", "smooth")),
)

pytestmark = pytest.mark.slow


def run_suite(suite: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run a suite with few updates; return its compositions by id, all of them measured."""
    report, thresholds = folder / "report.json", folder / "thresholds.yaml"
    # What so few updates achieve is not the question here; without any gate the suite's test fails.
    thresholds.write_text("'*': {average_bits: {min: 1, max: 32}}\n")
    options = [f"--lmcompose-suite={suite}", f"--lmcompose-json={report}", f"--lmcompose-thresholds={thresholds}"]
    options += [f"--lmcompose-set={setting}" for setting in SHORT]
    done = run_pytest(ROOT, "compositions", "-n2", "--lmcompose-no-cache", *options)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    records: dict[str, dict[str, Any]] = {r["id"]: r for r in json.loads(report.read_text())["compositions"]}
    for name, record in records.items():
        assert record["status"] == "measured", name
        assert record["executed"] == ([] if name == "base" else name.split("+")), name
        metrics = {m["metric"]: m["value"] for m in record["measurements"]}
        assert {"edit_success_exact", "recall", "average_bits", "sparsity"} <= set(metrics), name
        assert all(math.isfinite(value) for value in metrics.values()), name
    return records


def test_every_ordered_pair_runs_and_reports(tmp_path: Path) -> None:
    # Without the attack, which has its own suite, what only removes experts, what needs an output bias or another
    # model, and the steps that bring in weights of the user's.
    left = ("relearn", "reap", "steer", "merge")
    names = [name for name, method in methods().items() if name not in left and method.category != "checkpoint"]
    pairs = {f"{first}+{second}" for first in names for second in names if first != second}
    assert set(run_suite("every_pair", tmp_path)) == {"base", *names, *pairs}


def test_every_ordered_pair_of_categories_runs_and_reports(tmp_path: Path) -> None:
    names = ["memit", "rmu", "awq", "wanda", "sft", "abliterate", "merge[with=lora]"]
    pairs = {f"{first}+{second}" for first in names for second in names if first != second}
    assert set(run_suite("categories", tmp_path)) == {"base", *names, *pairs} - {"awq+wanda", "wanda+awq"}
