"""States whose numbers overflow are judged like any other: their gates fail, and every report is whole."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
import vl_convert  # noqa: F401  here, since it cannot be imported again when pytester has forgotten it

from evaluators.measurement import Measurement
from pytest_lmcompose.gate.paired import Paired, change, compare_with_base, describe, noise_floor
from tests.plugin.conftest import Project
from tests.plugin.test_run import by_id, read_report

HUGE, NAN = "inflate", "inflate[scale=1e30]"
IDS = ("base", "nudge", HUGE, NAN, f"{HUGE}+round", f"round+{HUGE}", f"{NAN}+round")
"""In both orders, so that composability, interference and survival are computed of them."""
FEW = ("base", "nudge", HUGE, NAN)
RULES = """
"*":
  perplexity: {max_ratio_of_base: 1.5, no_drop_p: 0.05}
  perplexity_edits: {max_rise: 10, no_drop_p: 0.05}
  perplexity_qa: {max: 1.0e12}
  recall: {no_drop_p: 0.05, max_drop: 0.9}
  edit_success_margin: {no_drop_p: 0.05}
  edit_success_f1: {max: 0.99, max_loss: 0.5}
  sparsity: {max: 0.99}
"""
OUTPUTS = (
    "--lmcompose-json=report.json",
    "--lmcompose-html=report.html",
    "--lmcompose-markdown=report.md",
    "--lmcompose-latex=report.tex",
    "--junitxml=junit.xml",
)


def check_whole(project: Project, result: pytest.RunResult, ids: tuple[str, ...] = IDS) -> dict[str, dict[str, Any]]:
    """Check that all outputs of a run are there and no traceback is; return the report's records."""
    text = result.stdout.str() + result.stderr.str()
    assert "Traceback" not in text and "INTERNALERROR" not in text and "Error:" not in text, text
    records = by_id(read_report(project.path / "report.json"))
    assert set(records) == set(ids)
    assert all(record["status"] == "measured" and record["error"] is None for record in records.values())
    for name in ("report.html", "report.md", "report.tex"):
        assert (project.path / name).stat().st_size
    ElementTree.parse(project.path / "junit.xml")
    return records


def check_judged(records: dict[str, dict[str, Any]]) -> None:
    """Check that infinite and missing likelihoods are values whose gates fail, and others keep theirs."""
    for name, value in ((HUGE, "inf"), (NAN, "nan")):
        for record in (records[c] for c in records if name in c.split("+")):
            found = {m["metric"]: m for m in record["measurements"]}
            assert found["perplexity"]["nonfinite"] == value and found["perplexity"]["value"] is None
            gates = [gate for gate in record["gates"] if gate["metric"] == "perplexity"]
            assert [(gate["gate"], gate["passed"]) for gate in gates] == [("finite", False)]
            assert f"perplexity = {value} is not finite" in gates[0]["message"]
            assert found["sparsity"]["value"] is not None
            assert all(gate["passed"] for gate in record["gates"] if gate["metric"] == "sparsity")
    recall = {m["metric"]: m for m in records[NAN]["measurements"]}["recall"]
    assert recall["nonfinite"] == "nan"
    assert all(gate["passed"] for gate in records["nudge"]["gates"] if gate["gate"] == "finite")


@pytest.fixture
def judged(project: Project) -> Project:
    (project.path / "thresholds.yaml").write_text(RULES)
    project.arguments.remove("--lmcompose-set=evaluate.questions=false")
    return project


def test_a_broken_state_is_judged_beside_others_and_a_stored_run(judged: Project) -> None:
    first = judged.run(*OUTPUTS, "--lmcompose-save=first", compose=IDS)
    check_judged(check_whole(judged, first))
    assert first.ret == pytest.ExitCode.TESTS_FAILED
    # Against itself: broken before and after.
    again = judged.run(*OUTPUTS, "--lmcompose-compare=first", "--lmcompose-compare-fail=perplexity:5%", compose=FEW)
    check_judged(check_whole(judged, again, FEW))


def test_a_state_that_breaks_or_recovers_is_compared_with_the_stored_one(judged: Project) -> None:
    judged.arguments.append("--lmcompose-set=evaluate.questions=false")
    scales = {"sound": "1.0001", "huge": "1e4", "nan": "1e30"}
    for name, scale in scales.items():
        judged.run(f"--lmcompose-set=inflate.scale={scale}", f"--lmcompose-save={name}", compose=("base", HUGE))
    for old, new in (("sound", "huge"), ("huge", "sound"), ("nan", "sound")):
        result = judged.run(
            "--lmcompose-json=report.json",
            "--lmcompose-markdown=report.md",
            f"--lmcompose-set=inflate.scale={scales[new]}",
            f"--lmcompose-compare={old}",
            "--lmcompose-compare-fail=perplexity:p0.01",
            "--lmcompose-compare-fail=recall:2se",
            compose=("base", HUGE),
        )
        text = result.stdout.str()
        assert "Traceback" not in text and "INTERNALERROR" not in text and "Error:" not in text
        record = by_id(read_report(judged.path / "report.json"))[HUGE]
        failed = {gate["message"] for gate in record["gates"] if gate["metric"] == "perplexity" and not gate["passed"]}
        assert failed and (new != "sound" or any("cannot be judged" in message for message in failed))


def test_repeats_of_a_broken_state_are_judged(judged: Project) -> None:
    judged.arguments.append("--lmcompose-set=evaluate.questions=false")
    result = judged.run(*OUTPUTS, "--lmcompose-repeats=2", compose=FEW)
    check_judged(check_whole(judged, result, FEW))


def test_a_model_with_nan_weights_is_one_line(project: Project, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = next(a for a in project.arguments if a.startswith("--lmcompose-model=")).partition("=")[2]
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = project.run(f"--lmcompose-model={broken}", "--lmcompose-json=report.json", compose=("base", "nudge"))
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.INTERNAL_ERROR)
    text = result.stdout.str() + result.stderr.str()
    assert "broken: 1 weights contain NaN or infinite values, such as model.layers.1.mlp.down_proj.weight" in text
    assert "Traceback" not in text and "INTERNALERROR" not in text


def test_a_drop_beyond_numbers_is_judged_and_survives_the_report() -> None:
    # Samples are likelihoods in nats: the state's mean is a number, the smallest drop that could be found is not.
    base = Measurement("perplexity", math.exp(2.0), 1.0, 4, False, (1.0, 3.0, 2.0, 2.0))
    state = Measurement("perplexity", math.exp(600.0), 1.0, 4, False, (1.0, 2396.0, 2.0, 1.0))
    paired, value = compare_with_base([state], [base], 0.05, 1)
    assert value == base.value and paired.drop == pytest.approx(math.exp(600)) and paired.smallest_drop is None
    assert "detects no rise" in describe(paired) and noise_floor([state], [base]) is None
    assert msgspec.json.decode(msgspec.json.encode(paired), type=Paired) == paired
    assert change([base], [state], "the old run").drop < 0
