"""A category with a method of its own, added by a project's conftest: found, planned, built, marked and held."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
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

SOURCE = Path(__file__).with_name("thin.py")
THRESHOLDS = """
"*":
  sparsity: {promised: 0.02}
  thinned: {promised: 0.5}
"""
LIST_OF_MODULES = """
import pathlib, sys
def pytest_unconfigure():
    top = {name.partition(".")[0] for name in sys.modules}
    pathlib.Path(__file__).with_name("modules").write_text(" ".join(sorted(top)))
"""
UNUSED_MODULES = {
    *("datasets", "lm_eval", "pandas", "peft", "pyarrow", "ray", "sacrebleu", "sklearn", "trl", "wandb"),
}
"""What a run without question tasks, adapters, tuning and trackers does without, also at its end."""


def test_it_is_short() -> None:
    assert len(SOURCE.read_text().splitlines()) + len(THRESHOLDS.splitlines()) <= 60


def test_a_run_builds_marks_measures_and_judges_it(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text(THRESHOLDS)
    (project.path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    project.pytester.makeconftest(INNER_CONFTEST + "import tests.plugin.thin\n" + LIST_OF_MODULES)
    outputs = ("--lmcompose-json=r.json", "--lmcompose-html=r.html", "--lmcompose-markdown=r.md", "--junitxml=r.xml")
    on = "--lmcompose-set=evaluate.also={thinness: {}}"
    compositions = ("base", "thin", "nudge", "thin+nudge[layers=[0,1]]", "nudge[layers=[0,1]]+thin")
    result = project.run_apart("-v", "-m", "thinning", on, *outputs, compose=compositions)
    lines = "\n".join(result.outlines)
    assert "1 failed" in lines and "2 passed" in lines and "2 deselected" in lines, lines
    result.stdout.fnmatch_lines(["*sparsity = * promised by thin and broken by nudge*: use thin+nudge*+thin*"])
    report = json.loads((project.path / "r.json").read_text())
    gates = {
        (record["id"], gate["metric"]): gate["passed"] for record in report["compositions"] for gate in record["gates"]
    }
    assert gates["thin", "thinned"] and gates["thin", "sparsity"]
    assert not gates["thin+nudge[layers=[0,1]]", "sparsity"]
    assert "thinned" in {entry["metric"] for entry in report["composability"]["orders"]}
    assert "thinned" in (project.path / "r.html").read_text() and "thinned" in (project.path / "r.md").read_text()
    imported = set((project.path / "modules").read_text().split())
    assert "transformers" in imported and not imported & UNUSED_MODULES


def test_the_tables_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_table", table.categories())
    monkeypatch.setattr(registry, "_table", registry.methods())
    known = dict(evaluators.evaluators())
    monkeypatch.setattr(evaluators, "evaluators", lambda: known)
    monkeypatch.delitem(sys.modules, "tests.plugin.thin", raising=False)
    importlib.import_module("tests.plugin.thin")
    recipe = load_recipe(CONF, ["thin.every=5"])
    assert registry.category_of("thin") == "thinning" == list(table.categories())[-1]
    found = list(promises(recipe, parse("thin+memit+thin[every=2]")))
    assert [(str(p.step), p.words, str(p.broken_by)) for p in found if p.category.name == "thinning"] == [
        ("thin", "sparsity = 0.2", "memit"),
        ("thin", "that layers are thin", "None"),
        ("thin[every=2]", "sparsity = 0.5", "None"),
        ("thin[every=2]", "that layers are thin", "None"),
    ]
    assert broken(recipe, parse("thin+memit")) == [
        "thin promises sparsity = 0.2, but memit follows it: use thin+memit+thin"
    ]
    text = scaffold.files(recipe, {"model": "model"}, parse("memit+thin"), ())["thresholds.yaml"]
    assert "# thin promises sparsity = 0.2.\n  sparsity: {min: 0.19}\n" in text
    assert "# thin promises that layers are thin.\n" in text


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
