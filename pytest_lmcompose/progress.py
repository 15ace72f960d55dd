"""Show the progress of a run: log lines, and a status line on a terminal. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest


class Progress:
    """Writes to the terminal immediately, past pytest's capture."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._worker = os.environ.get("PYTEST_XDIST_WORKER")
        self._status = ""

    def __call__(self, line: str) -> None:
        """Write a log line."""
        if self._config.get_verbosity() < 0:
            return
        self.clear()
        with self._uncaptured():
            if self._worker is not None:  # a worker has no terminal, but shares the controller's stderr
                sys.stderr.write(f"\n[{self._worker}] {line}\n")
                sys.stderr.flush()
            elif (reporter := self._reporter) is not None:
                _start_line(reporter)
                reporter.write_line(line)
                reporter.flush()

    def doing(self, text: str) -> None:
        """Show `text` as the status line, if there is a terminal."""
        reporter = self._reporter
        if reporter is None or not self._is_live(reporter):
            return
        with self._uncaptured():
            if not self._status:
                _start_line(reporter)
            self._draw(reporter, text[: reporter._tw.fullwidth - 1])

    def clear(self) -> None:
        """Remove the status line."""
        reporter = self._reporter
        if self._status and reporter is not None:
            with self._uncaptured():
                self._draw(reporter, "")

    @property
    def _reporter(self) -> pytest.TerminalReporter | None:
        return self._config.pluginmanager.getplugin("terminalreporter")  # type: ignore[no-any-return]

    def _is_live(self, reporter: pytest.TerminalReporter) -> bool:
        """Return whether to show a status line; overwritten lines would make a CI log unreadable."""
        quiet = self._worker is not None or self._config.get_verbosity() < 0 or os.environ.get("CI")
        return not quiet and bool(reporter.isatty)

    def _draw(self, reporter: pytest.TerminalReporter, text: str) -> None:
        # The reporter would count these characters as part of its own line.
        reporter._tw._file.write("\r" + text.ljust(len(self._status)) + ("" if text else "\r"))
        reporter.flush()
        self._status = text

    @contextmanager
    def _uncaptured(self) -> Iterator[None]:
        capture = self._config.pluginmanager.getplugin("capturemanager")
        with nullcontext() if capture is None else capture.global_and_fixture_disabled():
            yield


def _start_line(reporter: pytest.TerminalReporter) -> None:
    reporter.ensure_newline()
    if reporter._tw.width_of_current_line:  # `ensure_newline` ignores the letters of test results
        reporter._tw.line()
        reporter.flush()
