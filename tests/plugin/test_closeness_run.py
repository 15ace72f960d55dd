"""Closeness to the base model in a run: for every state and repeat, whether or not the base model is tested."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_lmcompose.gate.off import why_off
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.plugin.conftest import Project

NAMES = ("kl_to_base", "top1_agreement", "flips/recall", "flips_to_wrong/recall", "churn/recall")


def records(project: Project) -> dict[str, dict[str, Any]]:
    """Return the measurements of closeness of each composition in the report."""
    report = json.loads((project.path / "report.json").read_text())
    return {
        record["id"]: {m["metric"]: m for m in record["measurements"] if m["metric"] in NAMES}
        for record in report["compositions"]
    }


def test_every_state_is_compared_with_the_base_model(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text("'*': {kl_to_base: {max: 100}, flips/recall: {max: 0.99}}")
    options = ("--lmcompose-repeats=2", "--lmcompose-json=report.json")
    assert project.run(*options, compose=("base", "nudge")).ret == pytest.ExitCode.OK
    both = records(project)
    assert [list(found) for found in both.values()] == [list(NAMES)] * 2
    assert [m["value"] for m in both["base"].values()] == [0, 1, 0, 0, 0]
    nudged = both["nudge"]
    assert nudged["kl_to_base"]["value"] > 0 and nudged["top1_agreement"]["value"] < 1
    assert all(len(m["repeats"]) == 2 for m in nudged.values())
    assert project.run(*options, compose=("nudge",)).ret == pytest.ExitCode.OK
    assert records(project) == {"nudge": nudged}, "the base model is measured, but not reported"


def test_a_rule_on_flips_says_why_it_is_not_judged() -> None:
    world = WorldSettings(facts="facts.jsonl", perplexity="texts.jsonl")
    off = EvaluateSettings(recall=False)
    assert why_off("flips/recall", world, off) == "evaluate.recall=false"
    assert why_off("churn/accuracy/harmless", world, off) == "world.pools is empty"
    assert why_off("flips/recall", world, EvaluateSettings(closeness=False)) == "evaluate.closeness=false"
    assert why_off("kl_to_base", WorldSettings(), off) == "world.perplexity=null"
    assert why_off("flips/recall", world, EvaluateSettings()) is None
