"""A category, a method and a metric that a project's conftest adds: found, planned, built, marked and gated."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluators import registry as evaluators
from interventions import categories as table
from interventions import registry
from pytest_lmcompose import scaffold
from pytest_lmcompose.composition import parse
from pytest_lmcompose.gate.promises import broken, promises
from pytest_lmcompose.recipe import RecipeError, load_recipe
from pytest_lmcompose.run import CONF
from tests.plugin.conftest import INNER_CONFTEST, Project

SOURCE = Path(__file__).with_name("tune.py")
THRESHOLDS = """
"*":
  sparsity: {promised: 0.02}
  silent_inputs: {promised: 0.24}
"""
COMPOSE = ("thin", "thin+nudge[layers=[0,1]]", "nudge")


def test_it_is_short() -> None:
    assert len(SOURCE.read_text().splitlines()) + len(THRESHOLDS.splitlines()) <= 60


@pytest.fixture
def tuned(project: Project) -> Callable[..., pytest.RunResult]:
    """Run the project with what `tune` adds; `thresholds` are those of the run."""
    project.pytester.makeconftest(INNER_CONFTEST + "import tests.plugin.tune\n")

    def run(thresholds: str, *arguments: str) -> pytest.RunResult:
        (project.path / "thresholds.yaml").write_text(thresholds)
        also = "--lmcompose-set=evaluate.also.silent={}"
        return project.run_apart("--strict-markers", "-v", "-m", "tune", also, *arguments, compose=COMPOSE)

    return run


def test_a_run_builds_marks_measures_and_gates_it(project: Project, tuned: Callable[..., pytest.RunResult]) -> None:
    result = tuned(THRESHOLDS, "--lmcompose-json=report.json")
    lines = "\n".join(result.outlines)
    assert "2 failed" in lines and "1 passed" in lines and "1 deselected" in lines, lines
    result.stdout.fnmatch_lines(
        [
            "*sparsity = * promised by thin and broken by nudge*: use thin+nudge*+thin*",
            "*silent_inputs = 0.2* < 0.24, promised by thin*",
        ]
    )
    assert "silent_inputs: thin!" in lines
    report = json.loads((project.path / "report.json").read_text())
    gates = {c["id"]: {(g["metric"], g["gate"]): g["passed"] for g in c["gates"]} for c in report["compositions"]}
    assert gates["thin"] == {("sparsity", "promised"): True, ("silent_inputs", "promised"): True}
    assert set(gates[COMPOSE[1]].values()) == {False}
    (thin,) = [c for c in report["compositions"] if c["id"] == "thin"]
    (value,) = [m["value"] for m in thin["measurements"] if m["metric"] == "silent_inputs"]
    assert value == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("silent_inputs: {min: 0}", "silent_inputs: min 0 can never fail"),
        ("silent_inputs: {max_drop: 1}", "silent_inputs: max_drop 1 can never fail"),
        ("silent_inputs: {promised: 2}", "silent_inputs: promised 2 can never hold"),
        ("silent_input: {min: 0.1}", "no evaluator measures 'silent_input'. Did you mean silent_inputs?"),
    ],
)
def test_its_thresholds_are_checked_like_any(tuned: Callable[..., pytest.RunResult], rule: str, problem: str) -> None:
    result = tuned(f"'*': {{{rule}}}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert problem.rstrip("?") in result.stderr.str()


def test_the_tables_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "register", lambda evaluator: evaluator)
    monkeypatch.setattr(table, "_table", table.categories())
    monkeypatch.setattr(registry, "_table", registry.methods())
    monkeypatch.delitem(sys.modules, "tests.plugin.tune", raising=False)
    importlib.import_module("tests.plugin.tune")
    recipe = load_recipe(CONF, ["thin.every=5"])
    assert registry.category_of("thin") == "tune" == list(table.categories())[-1]
    found = list(promises(recipe, parse("thin+memit+thin[every=2]")))
    assert [(str(p.step), p.words, str(p.broken_by)) for p in found if p.category.name == "tune"] == [
        ("thin", "sparsity = 0.2", "memit"),
        ("thin", "that inputs stay silent", "None"),
        ("thin[every=2]", "sparsity = 0.5", "None"),
        ("thin[every=2]", "that inputs stay silent", "None"),
    ]
    assert broken(recipe, parse("thin+memit")) == [
        "thin promises sparsity = 0.2, but memit follows it: use thin+memit+thin"
    ]
    text = scaffold.files(recipe, "model", parse("memit+thin"), ())["thresholds.yaml"]
    assert "# thin promises sparsity = 0.2.\n  sparsity: {min: 0.19}\n" in text
    assert "# thin promises that inputs stay silent.\n" in text


def test_another_category_of_a_known_name_is_refused() -> None:
    with pytest.raises(ValueError, match="the category 'edit' is there already"):
        table.register_category(table.Category("edit", "something else"))


NOTEBOOK = """
import sys
from dataclasses import dataclass
from interventions import Intervention, find_method, methods, register

def define(default):
    @dataclass(frozen=True)
    class Mine(Intervention):
        name, category = "mine", "edit"
        factor: float = default
    return Mine

register(define(1.0))
again = register(define(2.0))
assert find_method("mine") == again and again.settings_type()().factor == 2.0
assert "memit" in methods() and "torch" not in sys.modules
try:
    register(type("Other", (Intervention,), {"name": "memit", "category": "edit"}))
except ValueError as error:
    assert "redefines the intervention 'memit' of interventions.edit.memit:MemitSettings" in str(error), error
else:
    raise AssertionError
"""


def test_a_notebook_may_define_its_method_again_but_none_of_another_name() -> None:
    subprocess.run([sys.executable, "-c", NOTEBOOK], check=True)


def test_a_method_of_an_unknown_category_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = registry.Method("odd", "tun", registry.find_method("rtn").settings_type())
    monkeypatch.setitem(registry._table, "odd", odd)
    with pytest.raises(RecipeError, match="the intervention 'odd': unknown category 'tun'; known: edit, unlearn"):
        load_recipe(CONF)
