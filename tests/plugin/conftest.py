"""A world, a model and a way to run the plugin on them, with stub interventions."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import evaluators
import interventions
import pytest_lmcompose
from interventions import registry
from pytest_lmcompose.imports import fast_imports
from pytest_lmcompose.recipe import load_recipe
from pytest_lmcompose.run import CONF
from tests.plugin.stubs import METHODS
from tests.plugin.tiny import write_model, write_world

ROOT = Path(__file__).parent.parent.parent

# The stubs join the registry before the recipe's schema is made from it.
INNER_CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from interventions import register
from tests.plugin.stubs import METHODS
for method in METHODS:
    register(method)
"""

INNER_TEST = """
import pytest

def test_it(composition, gates, subtests):
    for gate in gates:
        with subtests.test(gate.metric + " " + gate.gate):
            if not gate.passed:
                pytest.fail(gate.message, pytrace=False)
"""

NO_CACHE = "--lmcompose-no-cache"
UNUSED = ("cacheprovider", "hypothesispytest", "anyio")
"""Plugins of others that a project does without, which saves their import in each run."""
NOT_IMPORTED = ("engine_workers", "cluster", "wandb", "__main__")
"""Modules that need what is not installed everywhere, or that run when they are imported."""

THRESHOLDS = """
"*":
  edit_success_f1: {max: 0.99}
  perplexity: {max_ratio_of_base: 100}
"""


@pytest.fixture(scope="session")
def heavy_modules() -> None:
    """Import what runs import, before pytester notes what to forget after a run: nothing is imported twice."""
    with fast_imports():
        for package in (pytest_lmcompose, interventions, evaluators):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                if not any(part in module.name for part in NOT_IMPORTED):
                    importlib.import_module(module.name)
        load_recipe(CONF)  # with all that Hydra imports when it is first used


@pytest.fixture(scope="session")
def tiny_model(heavy_modules: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model; not to be written to."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a small world; not to be written to."""
    return write_world(tmp_path_factory.mktemp("world"))


class Project:
    """A folder with a test module that uses the plugin."""

    def __init__(self, pytester: pytest.Pytester, model: Path, world: Path) -> None:
        self.pytester = pytester
        self.path = pytester.path
        self.arguments = [
            f"--lmcompose-model={model}",
            f"--lmcompose-set=world.folder='{world}'",
            "--lmcompose-world=tinyworld",
            "--lmcompose-set=evaluate.edits=3",
            "--lmcompose-set=evaluate.questions=false",
            "--lmcompose-set=evaluate.refusal_tokens=1",
            "--lmcompose-thresholds=thresholds.yaml",
            NO_CACHE,
        ]
        pytester.makeconftest(INNER_CONFTEST)
        pytester.makepyfile(test_inner=INNER_TEST)
        (self.path / "thresholds.yaml").write_text(THRESHOLDS)

    def run(self, *arguments: str, compose: tuple[str, ...] = ()) -> pytest.RunResult:
        """Run pytest on the project, in this process, which has torch already; `compose` are ids."""
        return self.pytester.runpytest_inprocess(*self._all(arguments, compose), no_reraise_ctrlc=True)

    def run_apart(self, *arguments: str, compose: tuple[str, ...] = ()) -> pytest.RunResult:
        """Run pytest on the project in a process of its own."""
        return self.pytester.runpytest_subprocess(*self._all(arguments, compose))

    def command(self, *arguments: str, compose: tuple[str, ...] = ()) -> list[str]:
        """Return the command that runs pytest on the project, for a process that a test starts itself."""
        return [sys.executable, "-m", "pytest", *self._all(arguments, compose)]

    def _all(self, arguments: tuple[str, ...], compose: tuple[str, ...]) -> tuple[str, ...]:
        chosen = [f"--lmcompose-compose={name}" for name in compose]
        return (*(f"-pno:{name}" for name in UNUSED), *self.arguments, *chosen, *arguments)


@pytest.fixture
def project(
    pytester: pytest.Pytester, tiny_model: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """A project whose registry knows the stubs too, and this process's registry with it."""
    for method in METHODS:
        monkeypatch.setitem(registry._table, method.name, method)
    yield Project(pytester, tiny_model, tiny_world)


@pytest.fixture
def refused(project: Project) -> Callable[..., str]:
    """Run with arguments that must be refused before collection; return the message."""

    def run(*arguments: str, compose: tuple[str, ...] = ()) -> str:
        result = project.run(*arguments, compose=compose)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert "test session starts" not in result.stdout.str()
        return result.stderr.str()

    return run
