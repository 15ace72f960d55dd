"""`lmcompose list`, `plan`, `doctor` and what all commands share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from pytest_lmcompose import doctor
from pytest_lmcompose.cli import main
from pytest_lmcompose.cli.flags import PREFIX, plugin_flags
from pytest_lmcompose.cli.listing import first_sentence
from pytest_lmcompose.cli.planning import arguments

Apart = Callable[..., subprocess.CompletedProcess[str]]


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.fixture
def apart(tmp_path: Path) -> Apart:
    """Run the command in a process and a folder of its own."""

    def run(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
        start = ["-m", "pytest_lmcompose.cli"] if code is None else ["-c", code]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, *start, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(main), ids=" ".join)
def test_every_command_tells_what_it_does(path: tuple[str, ...]) -> None:
    result = call(*path, "--help")
    assert result.exit_code == 0
    usage, text = result.output.split("\n\n", 2)[:2]
    assert usage.startswith(f"Usage: main {' '.join(path)}") or usage.startswith(f"Usage: {' '.join(path)}")
    assert text.strip().endswith(".")
    assert main.commands[path[0]].get_short_help_str()


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["shwo", "x.json"], "'show'"),
        (["list", "sutes"], "suites"),
        (["compare", "a", "b", "--metirc=x"], "'--metric'"),
        (["cache", "clean"], "'clear'"),
        (["plan", "--sute=main"], "'--suite'"),
    ],
)
def test_misspelt_words_are_refused_with_near_names(words: list[str], near: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert near in result.stderr and result.stdout == ""


def test_list_needs_no_torch(apart: Apart) -> None:
    code = (
        "import sys\nfrom pytest_lmcompose.cli import main\nmain(['list'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = apart(code=code)
    assert result.returncode == 0, result.stderr
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    headings = [line[0] for line in lines if len(line) == 1]
    assert headings == ["methods", "evaluators", "suites", "presets"]
    assert any(line[:2] == ["memit", "edit"] for line in lines)
    assert next(line[:2] for line in lines if line[:1] == ["paper"]) == ["paper", "310"]
    assert any(line[0] == "model=tinyworld" for line in lines if line)


def test_list_takes_the_kinds_that_are_asked_for() -> None:
    result = call("list", "evaluators")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names[:4] == ["editing", "recall", "perplexity", "closeness"]
    assert names[-3:] == ["refusal", "efficiency", "latency"]


def test_every_built_in_evaluator_has_the_switch_that_list_tells() -> None:
    from pytest_lmcompose.settings import EvaluateSettings

    for line in call("list", "evaluators").output.splitlines():
        key = line.split()[1]
        if not key.startswith("evaluate.also."):
            assert isinstance(getattr(EvaluateSettings(), key.removeprefix("evaluate.").removesuffix("=true")), bool)


def test_the_first_sentence_of_a_text() -> None:
    assert first_sentence("AWQ (Lin et al., 2024). Defaults are\nthose of others.") == "AWQ (Lin et al., 2024)"
    assert first_sentence("As by Meng et al. (2023), e.g. Layers.") == "As by Meng et al. (2023), e.g. Layers"
    assert first_sentence('It is gone. "Really?" he said.\n\nMore.') == "It is gone"


PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def test_plan_prints_what_pytest_would(apart: Apart, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nlmcompose_compose = memit\n")
    from_ini = apart("plan")
    assert from_ini.returncode == 0, from_ini.stderr
    assert from_ini.stdout.splitlines()[-2:] == ["(base)", "  memit"]
    chosen = ["--lmcompose-compose=memit+awq", "--lmcompose-compose=memit+rtn", "--lmcompose-repeats=2"]
    ours = apart("plan", "--compose=memit+awq", *chosen[1:], "--json=none/at/all.json")
    assert ours.returncode == 0, ours.stderr
    (tmp_path / "test_it.py").write_text("def test_it(gates): ...\n")
    theirs = apart("-q", "--lmcompose-plan", *chosen, code=PYTEST).stdout
    assert ours.stdout.strip() in theirs
    assert "3 steps to apply instead of 4 (1 saved by shared prefixes), 2 times" in ours.stdout


def test_plan_is_that_of_the_shard(apart: Apart, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(gates): ...\n")
    chosen = [f"--lmcompose-compose={name}" for name in ("rtn+memit", "base", "memit+rtn", "rtn", "memit")]
    plans = []
    for number in (1, 2):
        ours = apart("plan", *chosen, f"--shard={number}/2")
        assert ours.returncode == 0, ours.stderr
        theirs = apart("-q", "--lmcompose-plan", *chosen, f"--lmcompose-shard={number}/2", code=PYTEST).stdout
        assert ours.stdout.strip() in theirs
        plans.append(ours.stdout.splitlines())
    assert [plan[0].partition(":")[0] for plan in plans] == ["3 compositions", "2 compositions"]
    assert plans[0][-3:] == ["base", "  memit", "    rtn"] and plans[1][-3:] == ["(base)", "  rtn", "    memit"]
    (tmp_path / "pytest.ini").write_text("[pytest]\nlmcompose_shard = 2/2\n")
    assert apart("plan", *chosen).stdout.splitlines() == plans[1]
    refused = apart("plan", *chosen, "--shard=3/2")
    assert (refused.returncode, refused.stdout) == (2, "") and "expected K/N" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite=mian"], "Did you mean main?"),
        (["--compose=memit+aqw"], "Did you mean awq"),
        (["--seed=-1"], "--lmcompose-seed: expected a whole number"),
    ],
)
def test_plan_refuses_what_pytest_does(apart: Apart, words: list[str], message: str) -> None:
    result = apart("plan", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_plan_takes_every_flag_of_the_plugin() -> None:
    flags, _ = plugin_flags()
    options = {name for option in main.commands["plan"].get_params(click.Context(main)) for name in option.opts}
    assert {PREFIX + flag.name for flag in flags} <= options
    assert {f"--{flag.name}" for flag in flags} <= options


def test_arguments_go_on_to_pytest_as_they_were_given() -> None:
    values = {"model": "m", "set": ("a=1", "b=2"), "no_cache": True, "resume": False, "json": None, "compare": "latest"}
    assert arguments(values) == [
        "--lmcompose-model=m",
        "--lmcompose-set=a=1",
        "--lmcompose-set=b=2",
        "--lmcompose-no-cache",
        "--lmcompose-compare=latest",
    ]


def test_doctor_finds_this_installation_sound(apart: Apart, tmp_path: Path) -> None:
    result = apart("doctor", f"--cache-dir={tmp_path / 'store'}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "!!" not in result.stdout
    for name in ("torch", "extras", "engines", "cores", "cpu"):
        assert name in result.stdout
    assert not (tmp_path / "store").exists()


def test_doctor_reports_what_is_broken_and_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMCOMPOSE_AUTOAWQ_PYTHON", str(tmp_path / "none"))
    monkeypatch.setattr(doctor, "requires", lambda _: ["click>=999", "nowhere", 'absent>=2; extra == "more"'])
    monkeypatch.setattr(doctor, "_devices", lambda: iter(()))
    result = call("doctor", f"--cache-dir={tmp_path / 'file'}")
    assert result.exit_code == 1
    lines = [line.strip() for line in result.output.splitlines()]
    assert any(line.startswith("!!  click") and ">=999 is required" in line for line in lines)
    assert any(line.startswith("!!  nowhere") and line.endswith("not installed") for line in lines)
    assert 'pip install "click>=999"' in lines
    assert any(line.startswith("--  more") for line in lines)  # an extra is nothing that a run needs
    assert 'pip install "pytest-lmcompose[more]"' in lines
    assert any(line.startswith("!!  autoawq") and "which is no interpreter" in line for line in lines)
    assert any(line.startswith("!!  folder") and line.endswith("is not a folder") for line in lines)
    assert lines[-1] == "4 broken"


def test_doctor_tells_of_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {check.name: check for check in doctor._devices()}
    assert found["torch"].state == "broken" and "cannot be imported" in found["torch"].detail
