"""The hooks that other plugins implement, by the example of the documentation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pytest_lmcompose import hookspec
from tests.plugin.conftest import Project

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hooked(project: Project) -> Project:
    """A project whose conftest file is the example."""
    shutil.copy(ROOT / "tests" / "example_hooks.py", project.path / "hooks_of_the_example.py")
    with (project.path / "conftest.py").open("a") as file:
        file.write(f"\nsys.path.insert(0, {str(project.path)!r})\npytest_plugins = ['hooks_of_the_example']\n")
    return project


def test_every_hook_is_called_with_what_the_page_says(hooked: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("nudge+round", "nudge")
    result = hooked.run("--lmcompose-engine=shortest-first", "-v", compose=chosen)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*test_it?nudge?*", "*test_it?nudge+round?*", "tracked 3 compositions in *"])
    events = [json.loads(line) for line in (hooked.path / "tracked.jsonl").read_text().splitlines()]
    steps = [(event["step"], event["of"]) for event in events if "step" in event]
    assert steps == [("nudge", "nudge"), ("round", "nudge+round")]
    measured = {event["composition"]: event for event in events if "composition" in event}
    assert set(measured) == {"base", *chosen}
    assert all("edit_success_f1" in event for event in measured.values())
    assert events[-1] == {"status": "finished", "compared": False}


def test_an_engine_that_nobody_offers_is_refused(project: Project) -> None:
    result = project.run("--lmcompose-engine=slurm", compose=("nudge",))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --lmcompose-engine=slurm: there is no such engine; *"])


def test_the_page_names_every_hook() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text()
    names = [name for name in vars(hookspec) if name.startswith("pytest_lmcompose_")]
    assert len(names) == 5
    assert all(f"| `{name}` |" in page for name in names)


def test_a_category_of_another_package_becomes_a_marker(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        from interventions import Category, register, register_category
        from interventions.compress.rtn import RtnSettings
        from interventions.registry import Method
        register_category(Category("join", "joins models"))
        register(Method("melt", "join", RtnSettings))
    """)
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("composition", ["melt", "rtn"], indirect=True)
        def test_it(composition):
            pass
    """)
    result = pytester.runpytest_subprocess("--strict-markers", "-m", "join", "-pno:cacheprovider")
    result.assert_outcomes(passed=1, deselected=1)
