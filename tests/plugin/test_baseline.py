"""Runs that are stored and compared, on a random model: every flag, and the builds that must go red or stay green."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.baseline.storage import Storage, read_run
from tests.plugin.conftest import Project
from tests.plugin.documents import typed
from tests.plugin.test_run import by_id, read_report
from tests.plugin.tiny import write_model

LOOSE = '"*": {perplexity: {max: 1e9}}'
"""Thresholds that every state keeps."""
WORSE = ("--lmcompose-set=nudge.scale=30", "--lmcompose-set=nudge.layers=[0,1]")
METRIC = "edit_locality_agreement"
"""1 in the stored run, and 0 in one that is worse."""
ID = "nudge+round"


@pytest.fixture
def stored(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with one stored run, v1, of `ID`."""
    monkeypatch.setenv("COLUMNS", "200")
    (project.path / "thresholds.yaml").write_text(LOOSE)
    project.arguments.append("--lmcompose-set=evaluate.edits=5")
    result = project.run("--lmcompose-save=v1", compose=(ID,))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["lmcompose: the run is stored as */.lmcompose/0001_v1.json"])
    return project


def runs(project: Project, folder: str = ".lmcompose") -> list[str]:
    return [run.path.name for run in Storage(project.path / folder).runs()]


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_worse_model_turns_the_build_red_on_its_line(stored: Project) -> None:
    kept = read_report(stored.path / ".lmcompose" / "0001_v1.json")
    assert kept["stored"] == {"name": "v1", "how": "save", "passed": True, "commit": None, "dirty": False}
    assert "prompts" not in kept and kept["model"]["architecture"].startswith("LlamaForCausalLM, 2 layers of width 32")
    fail = [f"--lmcompose-compare-fail={e}" for e in (f"{METRIC}:p0.2", f"*+round::{METRIC}:5%", "recall:0.5")]
    result = stored.run(*fail, *WORSE, "--lmcompose-json=report.json", compose=("round", ID))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "lmcompose: comparing with */0001_v1.json of *",
            f"{ID}  {METRIC} = 0 is worse than 1 of the baseline 0001_v1 at no_drop_p 0.2: p = 0.0312, after Holm*",
            f"{ID}  {METRIC} = 0 < max_loss 5% below 1 of the baseline 0001_v1 = 0.95 (n = 5, standard error 0; "
            "*worse: 5 of 5 samples, number 1, 2, 3, 4, 5)",
            "changes since the baseline 0001_v1 *",
            "settings differ: nudge: scale: 0.01 -> 30*",
            f"{ID}  {METRIC}! *",
            f"SUBFAILED[[]{METRIC} max_loss_percent] test_inner.py::test_it[[]{ID}]*",
        ]
    )
    # What the stored run lacks fails as well, and says what to do.
    result.stdout.fnmatch_lines(
        [f"round  {METRIC} = *: no_drop_p cannot be judged by the baseline 0001_v1: it has no round; *-baseline*"]
    )
    report = read_report(stored.path / "report.json")
    gates = {g["gate"]: g for g in by_id(report)[ID]["gates"]}
    assert {name: gate["passed"] for name, gate in gates.items()} == {
        "max": True,
        "no_drop_p": False,
        "max_loss_percent": False,
        "max_loss": True,
    }
    gate = gates["max_loss_percent"]
    assert (gate["reference"], gate["base_value"], gate["value"]) == ("the baseline 0001_v1", 1, 0)
    row = next(r for r in report["comparison"]["rows"] if (r["composition"], r["metric"]) == (ID, METRIC))
    assert (row["old"], row["new"], row["p"]) == (1, 0, 2 * 2**-5)
    assert runs(stored) == ["0001_v1.json"]  # a comparison stores nothing


def _place(report: dict[str, Any]) -> int:
    return [m["metric"] for m in by_id(report)[ID]["measurements"]].index("perplexity")


def test_honest_repeats_stay_green(stored: Project) -> None:
    expressions = ("perplexity*:p0.01", "recall*:0", "edit_*:1%", "perplexity*:3se")
    fail = [f"--lmcompose-compare-fail={e}" for e in expressions]
    for number in range(10):
        result = stored.run(*fail, "--lmcompose-autosave", "--lmcompose-require-baseline", compose=(ID,))
        assert result.ret == pytest.ExitCode.OK, (number, result.stdout.str())
    assert "drift" not in result.stdout.str()
    assert len(runs(stored)) == 11


def test_another_seed_is_told_and_pairs_what_it_does_not_change(stored: Project) -> None:
    fail = [
        f"--lmcompose-compare-fail={e}" for e in ("perplexity:50%", "perplexity:p1e-9", "recall:0.99", "recall:p0.01")
    ]
    result = stored.run(*fail, "--lmcompose-seed=7", compose=(ID,))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            f"*{ID}  recall = *: no_drop_p cannot be judged by the baseline 0001_v1: different facts were used, "
            "with seed 7 instead of seed 0*",
            "seed differs: seed 0 -> seed 7",
            "data differ: edits",
        ]
    )
    assert "perplexity" not in "".join(line for line in result.outlines if "SUBFAILED" in line)


def test_other_data_cannot_be_compared(stored: Project) -> None:
    result = stored.run("--lmcompose-compare-fail=perplexity:900%", "--lmcompose-set=evaluate.texts=3", compose=(ID,))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "*perplexity = *: max_loss_percent cannot be judged by the baseline 0001_v1: different texts were used*",
            "data differ: texts",
            "settings differ: evaluate.texts: 200 -> 3",
        ]
    )


def test_another_model_is_refused_before_work(stored: Project, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    result = stored.run("--lmcompose-compare", f"--lmcompose-model={folder}", compose=(ID,))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    error = result.stderr.str()
    assert "0001_v1.json cannot be compared with" in error and "another model: its architecture was" in error
    assert "compare with a run of this model (--lmcompose-update-baseline stores one)" in error


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--lmcompose-compare=v2"], ["no stored run 'v2'", "Nothing is stored there yet"]),
        (["--lmcompose-compare", "."], ["'.' is a folder, not a stored run", "--lmcompose-compare=latest"]),
        (["--lmcompose-compare=none.json"], ["no stored run 'none.json'"]),
        (["--lmcompose-compare=cut.json"], ["cut.json is broken or truncated", "store it again"]),
        (["--lmcompose-compare=newer.json"], ["newer.json has report schema 2", "install the pytest-lmcompose"]),
        (["--lmcompose-require-baseline"], ["no run that passed is stored", "--lmcompose-save=NAME"]),
        (["--lmcompose-compare-fail=recall"], ["--lmcompose-compare-fail: 'recall'", "[COMPOSITION::]METRIC:LIMIT"]),
        (
            ["--lmcompose-compare-fail=recall:0.5"],
            ["nothing to compare with: no run that passed"],
        ),
        (["--lmcompose-compare-fail=recall:p5"], ["the level is 5"]),
        (["--lmcompose-compare-fail=recall:5%%"], ["the limit is '5%%'", "3se"]),
        (["--lmcompose-compare-fail=recall:p5%"], ["the limit is 'p5%'"]),
        (["--lmcompose-compare-fail=::recall:5%"], ["expected [COMPOSITION::]METRIC:LIMIT"]),
        (["--lmcompose-compare-fail=recall:-1"], ["the limit is '-1'"]),
        (["--lmcompose-save=a b"], ["--lmcompose-save", "'a b'"]),
        (["--lmcompose-save=../x"], ["--lmcompose-save"]),
        (["--lmcompose-save=latest"], ["--lmcompose-save"]),
        (["--lmcompose-save=x", "--lmcompose-update-baseline"], ["remove --lmcompose-save"]),
        (["--lmcompose-force"], ["--lmcompose-force requires --lmcompose-update-baseline"]),
        (["--lmcompose-save=x", "--lmcompose-storage=conftest.py"], ["--lmcompose-storage: this is not a folder"]),
        (["--lmcompose-save=x", "--lmcompose-shard=1/2"], ["--lmcompose-shard: store the whole run"]),
    ],
)
def test_refused(project: Project, arguments: list[str], messages: list[str]) -> None:
    (project.path / "cut.json").write_text('{"schema_version": 1, "compositions": [')
    (project.path / "newer.json").write_text('{"schema_version": 2}')
    result = project.run("--collect-only", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "test session starts" not in result.stdout.str()
    error = result.stderr.str()
    assert all(message in error for message in messages), error
    assert "Traceback" not in error


def test_the_first_run_that_is_stored_is_compared_with_none(project: Project) -> None:
    fail = "--lmcompose-compare-fail=perplexity:5%"
    result = project.run(fail, "--lmcompose-compare", "--lmcompose-save=v1", compose=("nudge",))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["lmcompose: there is no stored run to compare with yet"])
    assert project.run(fail, "--lmcompose-json=report.json", compose=("nudge",)).ret == pytest.ExitCode.OK
    gates = by_id(read_report(project.path / "report.json"))["nudge"]["gates"]
    assert ("max_loss_percent", "the baseline 0001_v1") in [(gate["gate"], gate.get("reference")) for gate in gates]


def test_a_threshold_that_compares_with_no_stored_run_fails(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text('"*": {perplexity: {max_loss: {value: 5%, of: baseline}}}')
    result = project.run(compose=("nudge",))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*max_loss_percent cannot be judged by the baseline: no run that passed is stored in *-baseline*"]
    )


def test_a_failed_run_is_stored_as_such_and_passed_over(stored: Project) -> None:
    (stored.path / "thresholds.yaml").write_text('"*": {perplexity: {max: 1}}')
    result = stored.run("--lmcompose-autosave", "--lmcompose-storage=.lmcompose", compose=(ID,))
    result.stdout.fnmatch_lines(["lmcompose: the run is stored as *0002_auto.json and marked as failed"])
    (stored.path / "thresholds.yaml").write_text(LOOSE)
    result = stored.run("--lmcompose-compare", compose=(ID,))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "lmcompose: comparing with */0001_v1.json of *; skipped failed runs: 0002_auto",
            "changes since the baseline 0001_v1 *",
            "45 metrics compared: 45 identical, 0 within noise; -v shows them",
        ]
    )
    asked = stored.run("--lmcompose-compare=2", compose=(ID,))
    asked.stdout.fnmatch_lines(["lmcompose: comparing with */0002_auto.json of *"])


def test_the_baseline_is_updated_only_from_committed_files(stored: Project) -> None:
    git(stored.path, "init")
    update = "--lmcompose-update-baseline"
    dirty = stored.run(update, *WORSE, compose=(ID,))
    assert dirty.ret == pytest.ExitCode.USAGE_ERROR
    assert "files are not committed" in dirty.stderr.str() and "add --lmcompose-force" in dirty.stderr.str()
    assert ".lmcompose" not in dirty.stderr.str()  # what a run stores makes the tree no dirtier
    git(stored.path, "add", "conftest.py", "test_inner.py", "thresholds.yaml")
    git(stored.path, "commit", "-m", "x")
    fail = f"--lmcompose-compare-fail={METRIC}:5%"
    done = stored.run(update, fail, *WORSE, compose=(ID,))
    assert done.ret == pytest.ExitCode.OK  # the run takes the place of what it is worse than
    done.stdout.fnmatch_lines([f"{ID}  average_bits!  *changed", "45 metrics compared: *"])
    assert runs(stored) == ["0001_v1.json", "0002_v1.json"]  # the history stays
    kept = read_report(stored.path / ".lmcompose" / "0002_v1.json")
    assert re.fullmatch(r"[0-9a-f]{40}", kept["stored"].pop("commit"))
    assert kept["stored"] == {"name": "v1", "how": "update", "passed": True, "dirty": False}
    assert stored.run(fail, *WORSE, compose=(ID,)).ret == pytest.ExitCode.OK
    (stored.path / "thresholds.yaml").write_text('"*": {perplexity: {max: 1}}')
    forced = stored.run(update, "--lmcompose-force", compose=(ID,))
    assert forced.ret == pytest.ExitCode.TESTS_FAILED
    assert read_run(stored.path / ".lmcompose" / "0003_v1.json").stored.dirty


def test_a_failed_run_becomes_no_baseline(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text('"*": {perplexity: {max: 1}}')
    result = project.run("--lmcompose-update-baseline", compose=("nudge",))
    result.stdout.fnmatch_lines(["lmcompose: the baseline is not updated because tests failed*"])
    assert runs(project) == []


def test_workers_compare_with_the_run_that_the_controller_chose(stored: Project) -> None:
    """Another run is stored meanwhile, here by the worker itself, before the plugin looks for one."""
    conftest = stored.path / "conftest.py"
    late = "\nimport os, shutil\nif 'PYTEST_XDIST_WORKER' in os.environ:\n"
    late += "    shutil.copy('.lmcompose/0001_v1.json', '.lmcompose/0002_late.json')\n"
    conftest.write_text(conftest.read_text() + late)
    fail = (f"--lmcompose-compare-fail={METRIC}:5%", "--lmcompose-storage=.lmcompose")
    none = ("--lmcompose-compare-fail=rtn*::recall:1%",)
    result = stored.run_apart(
        "-n1", *fail, *none, *WORSE, "--lmcompose-autosave", "--lmcompose-json=report.json", compose=(ID,)
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"{ID}  {METRIC} = 0 < max_loss 5% below 1 of the baseline 0001_v1 = 0.95 *"])
    result.stdout.fnmatch_lines(
        ["failed: --lmcompose-compare-fail='rtn[*]::recall:1%': matches no composition that a test judges*"]
    )
    assert runs(stored) == ["0001_v1.json", "0002_late.json", "0003_auto.json"]
    assert read_report(stored.path / "report.json")["comparison"]["baseline"] == "0001_v1.json"


def test_ini_values(stored: Project) -> None:
    (stored.path / "kept").mkdir()
    (stored.path / ".lmcompose" / "0001_v1.json").rename(stored.path / "kept" / "0001_v1.json")
    (stored.path / "pytest.ini").write_text(
        "[pytest]\nlmcompose_storage = kept\nlmcompose_compare = latest\nlmcompose_compare_fail =\n"
        f"    {METRIC}:1%\nlmcompose_autosave = true\nlmcompose_require_baseline = true\n"
    )
    result = stored.run(*WORSE, compose=(ID,))
    result.stdout.fnmatch_lines([f"{ID}  {METRIC} = 0 < max_loss 1% below 1 of the baseline 0001_v1 = 0.99 *"])
    assert runs(stored, "kept") == ["0001_v1.json", "0002_auto.json"]


def test_slow_drift_is_flagged(stored: Project) -> None:
    """Every stored run is a little worse than the one before it, and so is this one."""
    folder = stored.path / ".lmcompose"
    first = read_report(folder / "0001_v1.json")
    place = _place(first)
    now = by_id(first)[ID]["measurements"][place]["value"]
    (folder / "0001_v1.json").unlink()
    for number in range(8):
        document = json.loads(json.dumps(first))
        by_id(document)[ID]["measurements"][place]["value"] = now - 0.01 * (8 - number)
        Storage(folder).save(typed(document), "v1")
    result = stored.run("--lmcompose-compare", "--lmcompose-json=report.json", compose=(ID,))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines([f"drift over 9 runs: {ID}  perplexity *: 0.08 worse (Mann-Kendall p = *after Holm *"])
    drift = read_report(stored.path / "report.json")["drift"]
    assert (drift["runs"], drift["judged"], [row["metric"] for row in drift["rows"]]) == (9, 1, ["perplexity"])


def test_gates_of_single_steps_the_other_order_and_a_stored_run(stored: Project) -> None:
    (stored.path / "thresholds.yaml").write_text(
        f'"{ID}":\n'
        "  perplexity:\n"
        "    max_ratio: [1.5, {value: 1.5, of: single}]\n"
        "    max_rise: {value: 1000, of: reverse}\n"
        "    max_loss: {value: 1%, of: baseline}\n"
        "    no_drop_p: {value: 1.0e-6, of: round}\n"
        "  recall/nowhere: {min: 0.5}\n"
        '"memit*": {recall: {min: 0.5}}\n'
    )
    result = stored.run("--lmcompose-json=report.json", compose=(ID,))
    report = read_report(stored.path / "report.json")
    records = by_id(report)
    assert set(records) == {"base", "nudge", "round", "round+nudge", ID}  # built on demand
    gates = records[ID]["gates"]
    assert [(g["gate"], g.get("reference"), g["passed"]) for g in gates] == [
        ("max_ratio", None, True),
        ("max_ratio", "nudge", True),
        ("max_ratio", "round", True),
        ("max_rise", "round+nudge", True),
        ("max_loss_percent", "the baseline 0001_v1", True),
        ("no_drop_p", "round", True),
        ("measured", None, False),
    ]
    assert "round+nudge  step 2/2" in result.stdout.str()
    for gate in gates[:4]:
        of = records[gate.get("reference") or "base"]
        assert gate["base_value"] == of["measurements"][_place(report)]["value"]
    result.stdout.fnmatch_lines(
        [
            f"*{ID}  recall/nowhere was not measured, but has a threshold. Did you mean recall*",
            f"unused rule: '{ID}': 'recall/nowhere': matches no measured metric. Did you mean recall*",
            "rules for compositions that were not measured: 'memit[*]'",
        ]
    )
    assert [(rule["composition"], rule["tested"]) for rule in report["unused_rules"]] == [(ID, True), ("memit*", False)]


def test_a_reference_that_cannot_be_built_fails_the_gate_alone(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text('"nudge": {perplexity: {max_ratio: {value: 2, of: nudge+refuse}}}')
    result = project.run(compose=("nudge",))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*max_ratio cannot be judged by nudge+refuse: it could not be measured: step 2, refuse: layer 7 is missing*"]
    )


def test_a_reference_of_an_unknown_method_is_refused(refused: Callable[..., str], project: Project) -> None:
    (project.path / "thresholds.yaml").write_text('"*": {perplexity: {max_ratio: {value: 2, of: nugde}}}')
    assert "Did you mean nudge" in refused(compose=("nudge",))
