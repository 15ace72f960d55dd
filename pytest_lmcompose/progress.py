"""What the user sees while a run is working: lines that stay, and on a terminal a status line. Imports no torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

_SECONDS = 0.1
"""Between two updates of the status line by the same piece of work."""


class Progress:
    """Writes to the user at once, though pytest captures output."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._worker = os.environ.get("PYTEST_XDIST_WORKER")
        self._status = ""
        self._due = 0.0

    def __call__(self, line: str) -> None:
        """Write a line that stays."""
        if self._config.option.verbose < 0:
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

    def doing(self, text: str, *, soon: bool = False) -> None:
        """Show on a terminal what is being done; the next text replaces it.

        With `soon`, the text may be left out if the one before has just been written.
        """
        reporter = self._reporter
        if reporter is None or not self._is_live(reporter) or (soon and time.monotonic() < self._due):
            return
        with self._uncaptured():
            if not self._status:
                _start_line(reporter)
            self._draw(reporter, text[: reporter._tw.fullwidth - 1])
        self._due = time.monotonic() + _SECONDS

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
        """Say whether somebody watches a terminal: lines that are written over make a CI log unreadable."""
        quiet = self._worker is not None or self._config.option.verbose < 0 or os.environ.get("CI")
        return not quiet and bool(reporter.isatty)

    def _draw(self, reporter: pytest.TerminalReporter, text: str) -> None:
        # Not through the reporter, which would count these characters as part of its own line.
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
    if reporter._tw.width_of_current_line:  # letters of results, which `ensure_newline` does not count
        reporter._tw.line()
        reporter.flush()
