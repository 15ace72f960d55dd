"""`lmcompose init`: the repository that it writes works."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from pytest_lmcompose.cli import main
from pytest_lmcompose.gate.thresholds import read_expression, read_rules
from pytest_lmcompose.locate import model_overrides
from pytest_lmcompose.recipe import load_recipe
from pytest_lmcompose.run import CONF
from tests.started import Finished, run_pytest

WRITTEN = {
    "test_release.py",
    "thresholds.yaml",
    "pytest.ini",
    ".gitignore",
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


def run(folder: Path, *arguments: str) -> Finished:
    return run_pytest(folder, "-q", *arguments, timeout=500, XDG_CACHE_HOME=str(folder / "cache"))


def test_the_gate_goes_green_then_red(tmp_path: Path, tiny_model: Path, tiny_world: Path) -> None:
    """A run is stored, one like it passes, then a model of fewer bits than promised fails on its bits."""
    world = tmp_path.with_suffix(".yaml")
    shared = "zsre.json\ncalibration: calibration.jsonl\nperplexity: perplexity-heldout.jsonl\nfacts: facts.jsonl\n"
    world.write_text(f"folder: {tiny_world}\nedits: {shared}")
    result = call(str(tmp_path), f"--model={tiny_model}", f"--world={world}", "--compose=rtn[bits=8]")
    world_line = f"lmcompose_world = {world}\n"
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == WRITTEN | {"model.yaml"}
    assert all(f"wrote {tmp_path / name}" in result.output for name in WRITTEN)
    assert f"lmcompose_model = model.yaml\n{world_line}" in (tmp_path / "pytest.ini").read_text()
    small = [
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
    settings = (tmp_path / "pytest.ini").read_text()
    assert "lmcompose_compare_fail =\n    accuracy/harmless:p0.01\n    perplexity:5%\n" in settings
    (tmp_path / "pytest.ini").write_text(settings.replace("    accuracy/harmless:p0.01\n", ""))
    green = run(tmp_path, *small, "--lmcompose-save=v1")
    assert green.returncode == 0, green.stdout + green.stderr
    assert [path.name for path in (tmp_path / ".lmcompose").glob("*.json")] == ["0001_v1.json"]

    again = run(tmp_path, *small, "--lmcompose-json=report.json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert '"gate": "max_loss_percent"' in (tmp_path / "report.json").read_text()
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
    assert files(tmp_path) == {"pyproject.toml", "test_release.py", "thresholds.yaml", ".gitignore"}
    added = result.output.partition("these lines to [tool.pytest.ini_options]:\n")[2].partition("\nnext:")[0]
    found = tomllib.loads("\n".join(line for line in added.splitlines() if line.startswith("  ")))
    assert found == {
        "testpaths": "test_release.py",
        "lmcompose_model": "tinyworld",
        "lmcompose_thresholds": "thresholds.yaml",
        "lmcompose_compare_fail": ["edit_success_exact:0.02", "accuracy/harmless:p0.01", "perplexity:5%"],
    }


@pytest.mark.parametrize(
    ("compose", "expected"),
    [
        ("memit+awq[bits=3]", {"edit_success_exact": "min", "average_bits": "min", "perplexity": "max_ratio_of_base"}),
        ("rmu+wanda", {"accuracy/hazardous": "max_ratio_of_base", "sparsity": "min"}),
        ("wanda+awq[bits=3]", {"sparsity": "min", "average_bits": "max"}),
        ("awq[bits=3]+wanda", {"sparsity": "min", "average_bits": "max"}),
        ("awq+memit+awq[bits=3]", {"edit_locality_agreement": "min", "average_bits": "max"}),
        ("awq+memit", {"edit_locality_agreement": "min"}),
    ],
)
def test_thresholds_are_what_the_steps_promise(tmp_path: Path, compose: str, expected: dict[str, str]) -> None:
    assert call(str(tmp_path), f"--compose={compose}").exit_code == 0
    found = {rule.metric: [bound.kind for bound in rule.bounds] for rule in read_rules(tmp_path / "thresholds.yaml")}
    assert all(kind in found[metric] for metric, kind in expected.items())
    assert ("average_bits" in found) == ("awq[bits=3]" in compose)  # an edit leaves the grid again
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
        assert "--lmcompose-require-baseline" in line and "compare-fail" not in line
    lines = (tmp_path / "pytest.ini").read_text().partition("lmcompose_compare_fail =\n")[2].splitlines()
    assert [read_expression(line.strip()).metric for line in lines] == [
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


@pytest.mark.parametrize(
    ("compose", "reasons"),
    [
        ("awq+memit", ["awq promises average_bits = 4, but memit follows it: use awq+memit+awq"]),
        ("awq+memit+awq", []),
        ("wanda+ft", ["wanda promises sparsity = 0.5, but ft follows it: use wanda+ft+wanda"]),
        ("wanda+gptq", []),
        ("rtn+sparsegpt", ["rtn promises average_bits = 4, but sparsegpt follows it: use rtn+sparsegpt+rtn"]),
        (
            "rtn[bits=8]+gptq",
            ["rtn[bits=8] promises average_bits = 8, but gptq follows it: use rtn[bits=8]+gptq+rtn[bits=8]"],
        ),
        ("rmu+relearn", ["rmu promises that knowledge is gone, and relearn, an attack, follows it"]),
    ],
)
def test_a_promise_that_cannot_hold_is_named_with_its_reason(tmp_path: Path, compose: str, reasons: list[str]) -> None:
    result = call(str(tmp_path), f"--compose={compose}")
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if " promises " in line] == reasons
    thresholds = (tmp_path / "thresholds.yaml").read_text()
    assert [line.partition("required: ")[2] for line in thresholds.splitlines() if "Not required" in line] == reasons
    read_rules(tmp_path / "thresholds.yaml")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("./x", "../x"),
        ("x", "../x"),
        ("gate/y", "./y"),
        ("{}/x", "{}/x"),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
    ],
)
def test_a_model_is_found_where_its_path_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x", "gate/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    result = call("gate", f"--model={typed.format(tmp_path)}", "--world=paper", "--ci=none")
    assert result.exit_code == 0, result.output
    assert "lmcompose_model = model.yaml\nlmcompose_world = paper\n" in (tmp_path / "gate" / "pytest.ini").read_text()
    assert yaml.safe_load((tmp_path / "gate" / "model.yaml").read_text()) == {"model": {"path": found.format(tmp_path)}}
    monkeypatch.chdir(tmp_path / "gate")
    recipe = load_recipe(CONF, model_overrides("model.yaml", CONF, Path("elsewhere", "..").resolve()))
    assert Path(recipe.model.path).resolve() == Path(found.format(tmp_path)).resolve()


def test_what_git_ignores_is_added_by_hand_where_there_is_such_a_file(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("junit.xml\n")
    result = call(str(tmp_path))
    assert result.exit_code == 0 and (tmp_path / ".gitignore").read_text() == "junit.xml\n"
    assert ".gitignore exists and is not changed; add these lines:" in result.output
    assert "\n  report.json\n" in result.output and "\n  junit.xml\n" not in result.output


def test_ci_examples_take_the_cpu_build_and_keep_what_pip_loads(tmp_path: Path) -> None:
    assert call(str(tmp_path)).exit_code == 0
    github = yaml.safe_load((tmp_path / ".github/workflows/release-gate.yml").read_text())
    gitlab = yaml.safe_load((tmp_path / ".gitlab-ci.yml").read_text())["release gate"]
    steps = github["jobs"]["gate"]["steps"]
    for lines in ([step["run"] for step in steps if "run" in step], gitlab["script"]):
        torch, plugin = (next(i for i, line in enumerate(lines) if name in line) for name in ("/cpu", "[html]=="))
        assert torch < plugin
    python = next(step["with"] for step in steps if "setup-python" in step.get("uses", ""))
    assert python["cache"] == "pip" and (tmp_path / python["cache-dependency-path"]).is_file()
    assert gitlab["variables"]["PIP_CACHE_DIR"].endswith("/pip-cache") and "pip-cache/" in gitlab["cache"]["paths"]


def test_a_model_without_a_world_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    result = call(str(tmp_path / "gate"), f"--model={tiny_model}")
    assert result.exit_code == 2 and "no world for the model" in result.stderr and "paper" in result.stderr
    assert files(tmp_path) == set()
    assert call(str(tmp_path / "gate"), "--model=pythia", "--ci=none").exit_code == 0  # its preset chooses one
    assert "lmcompose_world" not in (tmp_path / "gate" / "pytest.ini").read_text()


def test_a_world_that_is_not_there_is_written_to_be_filled_in(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("gate", f"--model={tiny_model}", "--world=data/mine.yaml", "--ci=none")
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert "Fill in gate/data/mine.yaml" in result.output
    text = (tmp_path / "gate" / "data" / "mine.yaml").read_text()
    filled = "\n".join(
        line[2:] if line.startswith("# ") and ":" in line.split()[1] else line for line in text.split("\n")
    )
    filled = filled.replace("#   ", "  ")
    (tmp_path / "filled.yaml").write_text(filled)
    world = load_recipe(CONF, [f"world='{tmp_path / 'filled.yaml'}'"]).world
    assert (world.edits, world.retain, world.pools["hazardous"]) == ("edits.json", "retain.txt", ["wmdp_chem"])
    assert call(*words[:2], "--world=../mine.yaml").exit_code == 2
    assert call(*words[:2], "--world=papr").exit_code == 2


def test_a_world_and_presets_that_are_there_are_named_as_seen_from_the_release(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "conf/model/ours.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine.yaml").write_text("edits: a.json\n")
    (tmp_path / "conf" / "model" / "ours.yaml").write_text(f"path: {tiny_model}\n")
    result = call("gate", "--model=ours", "--world=mine.yaml", "--conf=conf", "--ci=none")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "gate" / "pytest.ini").read_text().splitlines()
    assert {"lmcompose_model = ours", "lmcompose_world = ../mine.yaml", "lmcompose_conf = ../conf"} <= set(lines)
