"""The pytest plugin in the process that runs a part; see `work`. Imports no torch.

For other plugins, the process looks like a worker of pytest-xdist: it has `config.workerinput`, and the controller
reports the tests.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.composition import parse
from pytest_lmcompose.distribute.ray.work import PART
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.session import SESSION, Session


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    part = json.loads(Path(os.environ[PART]).read_text(encoding="utf-8"))
    config.workerinput = part["inputs"]  # type: ignore[attr-defined]
    threading.Thread(target=_die_with, args=(part["alive"],), daemon=True).start()
    config.pluginmanager.register(Inside(config, part), "lmcompose-inside")


def _die_with(pipe: int) -> None:
    """Exit when the other end of `pipe` closes, because nobody reads the reports any more."""
    os.read(pipe, 1)
    os._exit(1)


class Inside:
    """Runs the tests of the part; writes one event per line."""

    def __init__(self, config: pytest.Config, part: dict[str, Any]) -> None:
        self._config, self._part = config, part
        self._folder = Path(part["folder"])
        self._events = (self._folder / "events").open("w", encoding="utf-8")

    def pytest_collection(self) -> None:
        self._session.only = frozenset(self._part["tests"])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        store = self._session.run.cache
        for path in sorted((self._folder / "in").iterdir()):
            if store is not None and not store.holds(path.name):
                store.adopt(path.name, path)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write("report", self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write("finish", nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        run, leaves = self._session.run, self._part["leaves"]
        if leaves is None or run.cache is None or session.shouldstop or session.shouldfail:
            return
        try:
            addresses = run.prepare(parse(leaves))
        except BuildError:  # the dependent tests fail with the same error
            return
        for address in addresses:
            if run.cache.holds(address):  # unless it is too large to be kept
                run.cache.pack(address, self._folder / "out" / address)

    @property
    def _session(self) -> Session:
        return self._config.stash[SESSION]

    def _write(self, kind: str, value: Any) -> None:
        self._events.write(json.dumps([kind, value]) + "\n")
        self._events.flush()
