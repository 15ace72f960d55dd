"""A plugin that uses the hooks of pytest-lmcompose: a tracker, a line of the terminal summary, and an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.results import CompositionResult, Report
from pytest_lmcompose.session import composition_of
from pytest_lmcompose.steps import StepRecord

LOG = Path("tracked.jsonl")


def track(**event: Any) -> None:
    with LOG.open("a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_lmcompose_step_applied(composition: Composition, step: StepRecord) -> None:
    track(step=str(step.step), of=str(composition), seconds=step.report.seconds)


def pytest_lmcompose_composition_measured(record: CompositionResult) -> None:
    track(composition=record.id, **{measured.metric: measured.value for measured in record.measurements})


def pytest_lmcompose_report(report: Report, baseline: Report | None) -> None:
    track(status=report.status, compared=baseline is not None)


def pytest_lmcompose_terminal_summary(terminalreporter: pytest.TerminalReporter, report: Report) -> None:
    terminalreporter.write_line(f"tracked {len(report.compositions)} compositions in {LOG}")


class ShortestFirst:
    """Runs the tests in this process, those of the shortest compositions first."""

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None
        items = sorted(session.items, key=lambda item: len(c.steps) if (c := composition_of(item)) else 0)
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return True


def pytest_lmcompose_make_engine(name: str) -> object | None:
    return ShortestFirst() if name == "shortest-first" else None
