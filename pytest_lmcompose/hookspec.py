"""Hooks for plugins and conftest files: trackers, reporters, and engines that run the tests.

Omit arguments that you do not need. See docs/hooks.md for examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_lmcompose.composition import Composition
    from pytest_lmcompose.results import CompositionResult, Report
    from pytest_lmcompose.steps import StepRecord


@pytest.hookspec
def pytest_lmcompose_step_applied(config: pytest.Config, composition: Composition, step: StepRecord) -> None:
    """Called after a step has changed the model, in the process that applied it; not for cached states.

    `composition` ends with the step. `step.report` has the seconds, the changed parameters and details.
    """


@pytest.hookspec
def pytest_lmcompose_composition_measured(config: pytest.Config, record: CompositionResult) -> None:
    """Called when the measurements of a composition arrive, in the process that writes the report.

    `record` is its entry in the report's `compositions`. The hook is called again if a later test adds to it, for
    example gates.
    """


@pytest.hookspec
def pytest_lmcompose_report(config: pytest.Config, report: Report, baseline: Report | None) -> None:
    """Called with the report after the report files are written, also if the run was interrupted.

    `baseline` is the report of the stored run for comparison, if any.
    """


@pytest.hookspec
def pytest_lmcompose_terminal_summary(terminalreporter: pytest.TerminalReporter, report: Report) -> None:
    """Called after the terminal summary of pytest-lmcompose; write more lines here."""


@pytest.hookspec(firstresult=True)
def pytest_lmcompose_make_engine(config: pytest.Config, name: str) -> object | None:
    """Return the plugin that runs the tests for `--lmcompose-engine=NAME`, or None if this is not your engine.

    The plugin implements `pytest_runtestloop`; `pytest_lmcompose.session.composition_of(item)` returns the composition
    of a test. Raise `pytest.UsageError` if the engine cannot run. Not called for `local`.
    """


def read_reports(config: pytest.Config) -> bool:
    """Return whether any plugin implements a hook that needs the report."""
    hook = config.hook
    return bool(hook.pytest_lmcompose_report.get_hookimpls() or hook.pytest_lmcompose_terminal_summary.get_hookimpls())
