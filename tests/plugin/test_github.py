"""GitHub Actions: annotations and the job summary, of runs and of `lmcompose gate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pytest_lmcompose.cli import main
from pytest_lmcompose.report.github import ANNOTATIONS, SUMMARY, add_summary, annotation_lines, fitted
from tests.plugin.conftest import Project
from tests.plugin.test_logs import RIGHT, WORSE, lm_eval


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file for the job summary, in an environment like that of a job."""
    path = tmp_path / "summary.md"
    path.write_text("")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    return path


def test_what_ends_a_command_or_a_property_is_escaped() -> None:
    (line,) = annotation_lines([("a: b, 5%", "5 % of a, b: c\nnext\r\x1b[31m")], Path("x,y:z%.yaml"), {})
    assert line == "::error file=x%2Cy%3Az%25.yaml,title=a%3A b%2C 5%25::5 %25 of a, b: c%0Anext \\x1b[31m"


def test_files_are_relative_to_the_checkout(tmp_path: Path) -> None:
    environment = {"GITHUB_WORKSPACE": str(tmp_path)}
    assert (
        next(annotation_lines([("t", "m")], tmp_path / "a" / "b.yaml", environment))
        == "::error file=a/b.yaml,title=t::m"
    )
    outside = next(annotation_lines([("t", "m")], Path("/elsewhere/b.yaml"), environment))
    assert outside == "::error file=/elsewhere/b.yaml,title=t::m"


@pytest.mark.parametrize(("failures", "shown"), [(0, 0), (1, 1), (10, 10), (11, 10), (500, 10)])
def test_no_more_annotations_than_github_shows(failures: int, shown: int) -> None:
    lines = list(annotation_lines([("t", str(i)) for i in range(failures)], None, {}))
    assert len(lines) == shown <= ANNOTATIONS
    if failures > shown:
        assert lines[-1].endswith(f"::and {failures - shown + 1} more; the job summary lists them")


def test_long_messages_are_cut() -> None:
    (line,) = annotation_lines([("t" * 1000, "m" * 100_000)], None, {})
    assert len(line) < 5000


def test_a_summary_keeps_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("earlier\n")
    text = "".join(f"- line {i} of ü\n" for i in range(100_000))
    assert add_summary(text, {"GITHUB_STEP_SUMMARY": str(path)}) is None
    found = path.read_bytes()
    assert 0.99 * SUMMARY < len(found) <= SUMMARY
    assert found.startswith(b"earlier\n\n- line 0") and "The summary is cut here" in found.decode()
    assert add_summary(text, {"GITHUB_STEP_SUMMARY": str(path)}) is None
    assert len(path.read_bytes()) <= SUMMARY
    assert add_summary(text, {}) is None
    assert "could not be written" in str(add_summary(text, {"GITHUB_STEP_SUMMARY": str(tmp_path / "no" / "x")}))
    assert fitted("short", 100) == "short"


def test_a_run_annotates_failed_gates_and_adds_a_summary(project: Project, summary: Path) -> None:
    thresholds = project.path / "thresholds.yaml"
    thresholds.write_text('"*": {perplexity: {max: 1}}')
    result = project.run(compose=("nudge",))
    lines = [line for line in result.stdout.str().splitlines() if line.startswith("::")]
    (line,) = lines
    assert line.startswith("::error file=") and "thresholds.yaml,title=lmcompose%3A nudge::perplexity = " in line
    assert "> max 1 " in line
    assert summary.read_text().startswith("## ❌ lmcompose: 1 of 1 gate failed")
    summary.write_text("")
    off = project.run("--lmcompose-no-github", compose=("nudge",))
    assert "::error" not in off.stdout.str() and summary.read_text() == ""


def test_gates_of_logs_are_annotated_too(tmp_path: Path, summary: Path) -> None:
    logs = [str(lm_eval(tmp_path / name, samples)) for name, samples in (("old", RIGHT), ("new", WORSE))]
    found = CliRunner().invoke(main, ["gate", *logs, "--fail", "toy_task/acc:p0.01"])
    (line,) = (line for line in found.output.splitlines() if line.startswith("::"))
    assert line.startswith("::error file=new,title=lmcompose%3A toy_task/acc::")
    text = summary.read_text()
    assert text.startswith("## ❌ lmcompose: 1 of 1 gate failed") and "toy\\_task/acc | worse |" in text
    summary.write_text("")
    off = CliRunner().invoke(main, ["gate", *logs, "--fail", "toy_task/acc:p0.01", "--no-github"])
    assert (off.exit_code, "::error" in off.output, summary.read_text()) == (1, False, "")


def test_nothing_is_said_outside_of_github(tmp_path: Path, summary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS")
    logs = [str(lm_eval(tmp_path / name, samples)) for name, samples in (("old", RIGHT), ("new", WORSE))]
    found = CliRunner().invoke(main, ["gate", *logs])
    assert (found.exit_code, "::error" in found.output, summary.read_text()) == (1, False, "")
