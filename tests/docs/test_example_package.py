"""The worked example of the documentation: a package that adds an intervention and an evaluator, installed and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluators import registry
from evaluators.registry import Evaluator
from pytest_lmcompose.cache.address import measured_alike, measurements_address, read_module
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.recipe import RecipeError, load_recipe
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.plugin.tiny import write_model, write_world

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "example_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package, which pip has built and installed."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(PACKAGE, folder / "source")  # what a build leaves behind stays out of the repository
    command = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", *command, str(source)], check=True, timeout=120)
    return os.environ | {"PYTHONPATH": str(folder / "site")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    return [
        f"--lmcompose-model={write_model(folder / 'model')}",
        "--lmcompose-world=tinyworld",
        f"--lmcompose-set=world.folder='{write_world(folder / 'world')}'",
        "--lmcompose-set=evaluate=quick",
        "--lmcompose-set=evaluate.edits=2",
        "--lmcompose-set=evaluate.facts=4",
        "--lmcompose-set=evaluate.efficiency=false",
        "--lmcompose-no-cache",
    ]


@pytest.fixture(autouse=True)
def _not_imported() -> Iterator[None]:
    """Forget the package after each test of this process."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmcompose_example"]:
        del sys.modules[name]


def call(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_both_are_listed(installed: dict[str, str], tmp_path: Path) -> None:
    found = call(installed, tmp_path, "pytest_lmcompose.cli", "list", "methods", "evaluators")
    assert found.returncode == 0
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    assert [
        "clip",
        "compress",
        "Outlying weights of each linear layer, cut to a number of standard deviations",
    ] in lines
    assert any(line[:2] == ["repetition", "evaluate.also.repetition={}"] for line in lines)


def test_both_are_used_in_a_run(installed: dict[str, str], tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "thresholds.yaml").write_text('"*": {repetition: {max_rise: 0.99}}\n')
    (tmp_path / "test_it.py").write_text("def test_it(gates):\n    assert all(gate.passed for gate in gates)\n")
    chosen = [
        "--lmcompose-compose=clip",
        "--lmcompose-compose=clip[deviations=2.0]+rtn",
        "--lmcompose-set=evaluate.also.repetition={prompts:3,length:6}",
        "--lmcompose-thresholds=thresholds.yaml",
        "--lmcompose-json=report.json",
    ]
    found = call(installed, tmp_path, "pytest", "-q", "-pno:cacheprovider", *tiny, *chosen)
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    measured = {c["id"]: {m["metric"]: m for m in c["measurements"]} for c in report["compositions"]}
    assert set(measured) == {"base", "clip", "clip[deviations=2.0]+rtn"}
    for metrics in measured.values():
        assert metrics["repetition"]["n"] == 3
        assert metrics["repetition"]["note"] == "6 tokens"
    assert report["recipe"]["evaluate"]["also"] == {"repetition": {"prompts": 3, "prompt_words": 5, "length": 6}}
    steps = {step["id"]: step for c in report["compositions"] for step in c["steps"]}
    assert 0 < steps["clip"]["details"]["cut"] < steps["clip[deviations=2.0]"]["details"]["cut"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluate.also.repetitoin={}", "unknown evaluator 'repetitoin'. Did you mean repetition?"),
        ("evaluate.also.repetition={lenght:3}", "unknown key 'lenght'. Did you mean length?"),
        ("evaluate.also.repetition={length:many}", "evaluate.also.repetition.length=many: expected a whole number"),
        ("evaluate.also.repetition={length:0}", "evaluate.also.repetition.length=0: expected a whole number from 1 up"),
        ("evaluate.also.recall={}", "use evaluate.recall=true"),
    ],
)
def test_what_is_misspelt_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str, message: str) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))
    from lmcompose_example import REPETITION

    registry.register(REPETITION)
    try:
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(SUITE_FOLDER / "conf", [setting])
    finally:
        registry.evaluators.cache_clear()


def test_a_change_of_its_source_or_settings_misses_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Source and settings of an evaluator are part of the content address of what it measured."""
    shutil.copytree(PACKAGE / "lmcompose_example", tmp_path / "lmcompose_example")
    monkeypatch.syspath_prepend(str(tmp_path))
    evaluator = Evaluator("other", "", "lmcompose_example.settings:X", "lmcompose_example.repetition:repetition")
    registry.register(evaluator)

    def found(**settings: int) -> str:
        read_module.cache_clear()
        alike = measured_alike(WorldSettings(), EvaluateSettings(also={"other": settings}))
        return measurements_address("state", "data", alike)

    try:
        before = found()
        assert found() == before != found(length=3)
        with (tmp_path / "lmcompose_example" / "repetition.py").open("a") as file:
            file.write("# changed\n")
        assert found() != before
    finally:
        registry.evaluators.cache_clear()
        read_module.cache_clear()
