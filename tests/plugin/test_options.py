"""Flags and ini values, and what is refused before any work."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_lmcompose.report.files import TargetError, check_target
from tests.plugin.conftest import ROOT, Project


def collected(result: pytest.RunResult) -> list[str]:
    """Return the parameters of the collected tests, as `--collect-only -q` prints them."""
    lines = [line for line in result.outlines if "::" in line]
    return [line.partition("[")[2].removesuffix("]") for line in lines]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--lmcompose-compose=nugde+round"], ["unknown intervention 'nugde'", "Did you mean nudge"]),
        (["--lmcompose-compose=round[digit=3]"], ["unknown key 'digit' of round", "Did you mean digits?"]),
        (["--lmcompose-compose=round[digits=x]"], ["round.digits=x: expected a whole number"]),
        (["--lmcompose-compose=round["], ["round[", "^"]),
        (["--lmcompose-set=round.digit=3"], ["unknown key 'digit' of round", "Did you mean digits?"]),
        (["--lmcompose-set=round.digits=x"], ["round.digits=x: expected a whole number"]),
        (["--lmcompose-suite=mian"], ["no preset 'mian'", "Did you mean main?"]),
        (["--lmcompose-model=./no/model"], ["no such model folder"]),
        (["--lmcompose-set=world.folder=nowhere"], ["world.folder='nowhere'"]),
        (["--lmcompose-thresholds=none.yaml"], ["--lmcompose-thresholds: no such file", "none.yaml"]),
        (["--lmcompose-seed=-1"], ["--lmcompose-seed", "'-1'"]),
        (["--lmcompose-repeats=0"], ["--lmcompose-repeats", "'0'"]),
        (["--lmcompose-device=gpu"], ["--lmcompose-device", "'gpu'"]),
        (["--lmcompose-json=no/report.json"], ["--lmcompose-json", "does not exist"]),
        (["--lmcompose-json=."], ["--lmcompose-json", "this is a folder"]),
        (["--lmcompose-json=conftest.py/report.json"], ["--lmcompose-json", "does not exist"]),
    ],
)
def test_refused(refused: Callable[..., str], arguments: list[str], messages: list[str]) -> None:
    error = refused(*arguments)
    assert all(message in error for message in messages), error
    assert "Traceback" not in error


def test_no_permission_to_write_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**_: object) -> None:  # root may write everywhere, so a locked folder would prove nothing
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", denied)
    with pytest.raises(TargetError, match=r"cannot write in .*: Permission denied"):
        check_target(tmp_path / "report.json")


def test_checking_a_path_leaves_nothing_behind(tmp_path: Path) -> None:
    check_target(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_refused_by_the_controller_of_workers(refused: Callable[..., str]) -> None:
    assert "Did you mean nudge" in refused("-n", "2", compose=("nugde",))


def test_a_broken_id_in_a_users_module_is_a_usage_error(project: Project) -> None:
    project.pytester.makepyfile(
        test_inner="""
        import pytest

        @pytest.mark.parametrize("composition", ["nudge", "nugde"], indirect=True)
        def test_own(composition): ...
        """
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Did you mean nudge" in result.stderr.str()


def test_help_has_a_group(project: Project) -> None:
    output = project.pytester.runpytest_inprocess("--help").stdout.str()
    group = output[output.index("lmcompose: build, measure") :]
    valued = ("model", "suite", "compose", "set", "thresholds", "seed", "repeats", "device", "json")
    valued += ("html", "markdown", "latex", "columns", "sort", "group", "wandb", "wandb-entity", "wandb-tags")
    for name in (*valued, "cache-dir", "cache-size"):
        assert f"--lmcompose-{name}=" in group
        assert f"lmcompose_{name.replace('-', '_')} (" in output
    for name in ("no-cache", "resume", "plan"):
        assert f"--lmcompose-{name} " in group
    for name in ("autoawq", "gptqmodel", "llmcompressor", "auto_gptq"):
        assert f"lmcompose_{name}_python (" in output


def test_compose_takes_the_place_of_the_suite(project: Project) -> None:
    result = project.run("--collect-only", "-q", compose=("nudge+round", "round", "nudge", "round"))
    assert collected(result) == ["nudge", "nudge+round", "round"]


def test_suite_and_its_recipe(project: Project) -> None:
    assert collected(project.run("--collect-only", "-q", "--lmcompose-suite=single")) == [
        *("base", "ft", "memit", "lora", "rmu", "ga", "gd", "wanda", "sparsegpt", "gptq", "awq"),
    ]
    permuted = project.run(
        "--collect-only",
        "-q",
        "--lmcompose-set=suite.compositions=[base]",
        "--lmcompose-set=suite.permute=[nudge,round]",
    )
    assert collected(permuted) == ["base", "nudge", "nudge+round", "round", "round+nudge"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-k", "nudge and round"], ["nudge+round", "round[digits=1]+nudge"]),
        (["-m", "edit and compress"], ["nudge+round", "round[digits=1]+nudge"]),
        (["-m", "compress and not edit"], ["round"]),
        (["-m", "unlearn"], ["refuse"]),
        (["-m", "not (edit or compress or unlearn)"], ["base"]),
        (["test_inner.py::test_it[round[digits=1]+nudge]"], ["round[digits=1]+nudge"]),
    ],
)
def test_selection(project: Project, arguments: list[str], expected: list[str]) -> None:
    ids = ("base", "nudge+round", "round[digits=1]+nudge", "round", "refuse")
    result = project.run("--collect-only", "-q", "--strict-markers", *arguments, compose=ids)
    assert sorted(collected(result)) == sorted(expected)


def test_ini_values_are_defaults_of_the_flags(project: Project) -> None:
    project.pytester.makeini(
        "[pytest]\nlmcompose_seed = x\nlmcompose_compose =\n    nudge\n    nudge[scale=0.5]\n"
        "lmcompose_set =\n    round.digits=1\n"
    )
    assert "--lmcompose-seed" in project.run("--collect-only", "-q").stderr.str()
    result = project.run("--collect-only", "-q", "--lmcompose-seed=1")
    assert collected(result) == ["nudge", "nudge[scale=0.5]"]
    result = project.run("--collect-only", "-q", "--lmcompose-seed=1", compose=("round",))
    assert collected(result) == ["round"]


def test_interpreters_of_engines_come_from_the_ini_file_unless_the_environment_has_them(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCOMPOSE_GPTQMODEL_PYTHON", "/mine")
    monkeypatch.delenv("LMCOMPOSE_AUTO_GPTQ_PYTHON", raising=False)
    project.pytester.makeini(
        "[pytest]\nlmcompose_auto_gptq_python = engine/python\nlmcompose_gptqmodel_python = /other\n"
    )
    project.pytester.makepyfile(
        test_inner=f"""
        import os

        def test_it():
            assert os.environ["LMCOMPOSE_AUTO_GPTQ_PYTHON"] == {str(project.path / "engine/python")!r}
            assert os.environ["LMCOMPOSE_GPTQMODEL_PYTHON"] == "/mine"
        """
    )
    project.run().assert_outcomes(passed=1)
    assert "LMCOMPOSE_AUTO_GPTQ_PYTHON" not in os.environ


HEAVY = {
    *("accelerate", "datasets", "huggingface_hub", "hypothesis", "jinja2", "lm_eval", "numpy", "pandas", "peft"),
    *("pyarrow", "ray", "requests", "scipy", "sklearn", "sympy", "tokenizers", "torch", "transformers"),
    *("trl", "vl_convert", "wandb"),
}


def test_collection_imports_no_heavy_package(pytester: pytest.Pytester) -> None:
    code = f"""
import sys, pytest
options = ["--rootdir={ROOT}", "-c{ROOT}/pyproject.toml", "--collect-only", "-q", "-pno:cacheprovider"]
rc = pytest.main([{str(ROOT / "compositions")!r}, *options])
heavy = {HEAVY} & set(sys.modules)
print("HEAVY", sorted(heavy))
sys.exit(rc)
"""
    result = pytester.runpython_c(code)
    assert result.ret == 0
    assert collected(result) == ["base", "memit", "memit+awq", "awq", "awq+memit"]
    result.stdout.fnmatch_lines(["HEAVY []"])


def test_selection_as_written_from_the_projects_root(pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("compositions").symlink_to(ROOT / "compositions")
    pytester.path.joinpath("pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    for arguments in (("-k", "memit and awq"), ("-m", "edit and compress")):
        result = pytester.runpytest_subprocess("--collect-only", "-q", "-pno:cacheprovider", *arguments)
        assert collected(result) == ["memit+awq", "awq+memit"]


def test_other_projects_pay_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            assert not {"torch", "hydra", "omegaconf", "yaml"} & set(sys.modules)
        """
    )
    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:hydra_pytest"
    )
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*lmcompose report*")
