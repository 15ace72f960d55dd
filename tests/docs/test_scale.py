"""What docs/scale.py forecasts, and how it compares that with a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.composition import Composition, parse
from pytest_lmcompose.costs import Costs, StepCost
from pytest_lmcompose.plan import Plan
from tests.docs.test_docs import DOCS, module
from tests.plugin import documents


@pytest.fixture(scope="module")
def scale() -> Any:
    return module(DOCS / "scale.py")


def test_single_steps_forecast_the_rest_of_a_report(scale: Any, tmp_path: Path) -> None:
    """Steps take 1 s, and 1 s as the second step, but 3 s in one pair; an evaluation takes 1 s."""
    records = []
    for name in ("base", "memit", "awq", "memit+awq", "awq+memit"):
        steps = [documents.step(one, "edit") for one in name.split("+") if one != "base"]
        if name == "awq+memit":
            steps[-1]["seconds"] = 3.0
        records.append(documents.record(name, [], steps=steps))
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:10+00:00"}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(documents.report({}, compositions=records, **times)))
    assert list(scale.check(path, 1)) == [
        "1 of 2 longer compositions within 20%: last step and evaluation",
        "all steps and evaluations: forecast 9 s, measured 11 s, -18.2%",
        "whole run with 1 workers: forecast 9 s, measured 10 s, -10.0%",
    ]


def test_rates_from_two_methods_forecast_a_third_that_was_measured(scale: Any) -> None:
    rates = scale.Rates.of(scale.MEASURED["wanda"], scale.MEASURED["sparsegpt"])
    forecast = scale.step_seconds("gptq", scale.SMALL, rates) - scale.COPY
    assert forecast == pytest.approx(scale.MEASURED["gptq"], rel=scale.WITHIN)


def test_a_cluster_does_all_the_work_and_is_not_faster_than_the_longest_chain(scale: Any) -> None:
    compositions = [Composition(), *map(parse, ("memit", "memit+awq", "memit+rtn", "awq", "awq+memit", "rtn"))]
    costs = Costs.of([StepCost(name, name, 100.0, 0) for name in ("memit", "awq", "rtn")], [10.0])
    one, many = (scale.ray_seconds(compositions, workers, costs) for workers in (1, 64))
    assert one == pytest.approx(Plan.of(compositions).seconds(costs))
    assert many == pytest.approx(2 * 100.0 + 2 * 10.0)  # a pair, and both evaluations of its chain
