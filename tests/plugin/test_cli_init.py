"""`lmcompose init`: the repository that it writes works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from pytest_lmcompose.cli import main
from pytest_lmcompose.gates.thresholds import read_expression, read_rules

WRITTEN = {
    "test_release.py",
    "thresholds.yaml",
    "pytest.ini",
    ".github/workflows/release-gate.yml",
    ".gitlab-ci.yml",
}


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def commands(folder: Path) -> list[str]:
    """Return what the CI examples run."""
    github = yaml.safe_load((folder / ".github/workflows/release-gate.yml").read_text())
    gitlab = yaml.safe_load((folder / ".gitlab-ci.yml").read_text())
    steps = [step["run"] for step in github["jobs"]["gate"]["steps"] if "run" in step]
    return [line for line in (*steps, *gitlab["release gate"]["script"]) if line.startswith("pytest")]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def test_the_gate_goes_green_then_red(tmp_path: Path, tiny_model: Path, tiny_world: Path) -> None:
    """A run is stored, then a model of fewer bits than promised fails on its bits."""
    result = call(str(tmp_path), f"--model={tiny_model}", "--compose=rtn[bits=8]")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == WRITTEN
    assert all(f"wrote {tmp_path / name}" in result.output for name in WRITTEN)
    small = [
        f"--lmcompose-set=world.folder='{tiny_world}'",
        "--lmcompose-set=evaluate.edits=2",
        "--lmcompose-set=evaluate.editing=false",
        "--lmcompose-set=evaluate.recall=false",
        "--lmcompose-set=evaluate.questions=false",
    ]
    # A random model knows nothing: the gates of what must be left alone are not what is tried here.
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text(
        thresholds.read_text().replace("  recall:", "  # recall:").replace("  accuracy/", "  # accuracy/")
    )
    green = run(tmp_path, *small, "--lmcompose-save=v1")
    assert green.returncode == 0, green.stdout + green.stderr
    assert [path.name for path in (tmp_path / ".lmcompose").glob("*.json")] == ["0001_v1.json"]

    test = tmp_path / "test_release.py"
    test.write_text(test.read_text().replace("bits=8", "bits=3"))
    red = run(tmp_path, *small)
    assert red.returncode == 1, red.stdout + red.stderr
    assert "average_bits = 3 < min 8" in red.stdout


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    (tmp_path / "thresholds.yaml").write_text("mine")
    result = call(str(tmp_path))
    assert result.exit_code == 2
    assert "thresholds.yaml would be overwritten; see --force" in result.stderr
    assert files(tmp_path) == {"thresholds.yaml"}
    assert call(str(tmp_path), "--force").exit_code == 0
    assert files(tmp_path) == WRITTEN
    assert (tmp_path / "thresholds.yaml").read_text() != "mine"
    assert call(str(tmp_path)).exit_code == 0  # the same again


def test_settings_of_pytest_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-q"\n')
    result = call(str(tmp_path), "--ci=none")
    assert result.exit_code == 0
    assert files(tmp_path) == {"pyproject.toml", "test_release.py", "thresholds.yaml"}
    lines = [line.strip() for line in result.output.splitlines()]
    assert 'lmcompose_model = "tinyworld"' in lines
    assert 'lmcompose_thresholds = "thresholds.yaml"' in lines


@pytest.mark.parametrize(
    ("compose", "expected"),
    [
        ("memit+awq[bits=3]", {"edit_success_exact": "min", "average_bits": "min", "perplexity": "max_ratio_of_base"}),
        ("rmu+wanda", {"accuracy/hazardous": "max", "sparsity": "min"}),
        ("awq+memit", {"edit_locality_agreement": "min"}),
    ],
)
def test_thresholds_are_what_the_steps_promise(tmp_path: Path, compose: str, expected: dict[str, str]) -> None:
    assert call(str(tmp_path), f"--compose={compose}").exit_code == 0
    found = {rule.metric: [bound.kind for bound in rule.bounds] for rule in read_rules(tmp_path / "thresholds.yaml")}
    assert all(kind in found[metric] for metric, kind in expected.items())
    assert ("average_bits" in found) == compose.endswith("awq[bits=3]")  # an edit leaves the grid again
    assert ("edit_success_exact" in found) == ("memit" in compose)
    assert ("accuracy/hazardous" in found) == ("rmu" in compose)


def test_ci_examples_call_pytest_with_flags_that_it_takes(tmp_path: Path) -> None:
    import re

    from pytest_lmcompose.cli.flags import plugin_flags

    assert call(str(tmp_path), "--compose=memit+rmu+awq").exit_code == 0
    known = {f"--lmcompose-{flag.name}" for flag in plugin_flags()[0]}
    found = commands(tmp_path)
    assert len(found) == 2
    for line in found:
        assert set(re.findall(r"--lmcompose-[a-z-]+", line)) <= known
        expressions = re.findall(r"--lmcompose-compare-fail='([^']+)'", line)
        assert [read_expression(text).metric for text in expressions] == [
            "edit_success_exact",
            "accuracy/hazardous",
            "accuracy/harmless",
            "perplexity",
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compose=memit+aqw"], "Did you mean awq"),
        (["--compose=base"], "a release has at least one step"),
        (["--model=tinywrld"], "unknown model"),
        (["--model=./none"], "no such model folder"),
    ],
)
def test_what_cannot_be_released_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    result = call(str(tmp_path), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert files(tmp_path) == set()
