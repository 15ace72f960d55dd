"""Run tests on a Ray cluster: send parts of the plan as tasks, receive test reports.

Ray prefers the node that holds a task's start state in its object store. If a node dies, Ray runs its tasks on another
node and rebuilds lost states. Imports Ray when the tests begin.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.distribute.ray.parts import Part, parts
from pytest_lmcompose.distribute.ray.work import Job, Outcome, run_part
from pytest_lmcompose.options import Options
from pytest_lmcompose.session import BASELINE_INPUT, Session, composition_of

RETRIES = 3
"""Number of times to run a task again if its node dies."""
PARTS_PER_TASK = 2
"""Number of parts per concurrent task; more than one keeps the load balanced."""
WORTH_A_PROCESS = 30.0
"""Minimum seconds of work in a part; a process needs about ten to import torch, and loads the model."""
_FORWARDED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")


class RayEngine:
    """Runs the tests of compositions on the cluster, and all other tests locally."""

    def __init__(self, config: pytest.Config, session: Session) -> None:
        """Raise pytest.UsageError if Ray is missing or another option is incompatible."""
        if importlib.util.find_spec("ray") is None:
            raise pytest.UsageError("--lmcompose-engine=ray: Ray is not installed; pip install 'pytest-lmcompose[ray]'")
        if session.options.cache_dir is None:
            raise pytest.UsageError(
                "--lmcompose-engine=ray passes states between tasks through the cache: remove --lmcompose-no-cache"
            )
        if getattr(config.option, "tx", None) or getattr(config.option, "numprocesses", None):
            raise pytest.UsageError("--lmcompose-engine=ray and -n cannot be combined: Ray distributes the tests")
        self._config, self._session = config, session
        self._tell = session.progress
        self._items: dict[str, pytest.Item] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or self._config.option.collectonly:
            return None
        tests: dict[Composition, list[str]] = {}
        others = []
        for item in session.items:
            composition = composition_of(item)
            if composition is None:
                others.append(item)
            else:
                self._items[item.nodeid] = item
                tests.setdefault(composition, []).append(item.nodeid)
        with _cluster() as ray:
            waiting = self._send(ray, tests) if tests else {}
            try:
                for item, following in zip(others, [*others[1:], None], strict=False):
                    self._config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    _stop(session)
                while waiting:
                    done, _ = ray.wait(list(waiting), num_returns=1)
                    self._receive(ray, done[0], waiting.pop(done[0]), session)
                    _stop(session)
            finally:
                for task in waiting:
                    ray.cancel(task, force=True)
        return True

    def _send(self, ray: Any, tests: dict[Composition, list[str]]) -> dict[Any, list[str]]:
        """Start a task for each part; return the test ids by the reference of the task's outcome."""
        options = self._session.options
        gpus, slots = _slots(ray.cluster_resources(), options)
        costs = self._session.costs()
        least = WORTH_A_PROCESS if costs.methods or costs.evaluation else 0.0  # else costs are counts
        found = parts(tests, PARTS_PER_TASK * slots, costs.expected, least)
        self._tell(f"lmcompose: {len(found)} parts on a Ray cluster that runs {slots} at once")
        job = Job(
            tuple(map(str, self._config.invocation_params.args)),
            str(self._config.invocation_params.dir),
            {name: os.environ[name] for name in _FORWARDED if name in os.environ},
            {BASELINE_INPUT: self._session.baseline_for_workers()},
        )
        task = ray.remote(run_part).options(num_returns=2, num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        waiting: dict[Any, list[str]] = {}
        states: dict[int, Any] = {}
        shared = ray.put(job)
        # Parts with the most work behind them go first, but never before the part they depend on.
        for number in sorted(range(len(found)), key=lambda i: (-_root(found, i), i)):
            part = found[number]
            chosen = [test for composition in part.compositions for test in tests[composition]]
            before = [] if part.after is None else [states[part.after]]
            leaves = None if part.leaves is None else part.leaves.id
            outcome, states[number] = task.remote(shared, f"part{number + 1}", chosen, leaves, *before)
            waiting[outcome] = chosen
        return waiting

    def _receive(self, ray: Any, reference: Any, tests: Sequence[str], session: pytest.Session) -> None:
        """Report the outcome of a task to pytest."""
        try:
            outcome: Outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            for test in tests:
                self._fail(test, f"Ray lost the task of this test: {error}")
            return
        for line in outcome.lines:
            self._tell(f"[{outcome.node}] {line}")
        hook = self._config.hook
        for data in outcome.reports:
            report = hook.pytest_report_from_serializable(config=self._config, data=data)
            if getattr(report, "when", None) == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
            if getattr(report, "when", None) == "teardown":
                hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
        for test, message in outcome.crashed.items():
            self._fail(test, f"on {outcome.node}, {message}")
        if not (session.shouldfail or session.shouldstop):  # -x leaves tests out
            for test in outcome.unreported:
                self._fail(test, f"was not run on {outcome.node}:\n{outcome.output}")

    def _fail(self, test: str, message: str) -> None:
        item = self._items[test]
        report = pytest.TestReport(test, item.location, dict(item.keywords), "failed", message, "call")
        self._config.hook.pytest_runtest_logreport(report=report)


def _slots(resources: dict[str, float], options: Options) -> tuple[int, int]:
    """Return the GPUs per task and the number of concurrent tasks; raises pytest.UsageError."""
    available = resources.get("GPU", 0)
    gpus = max(1, options.gpus_per_worker) if options.device.startswith("cuda") or available else 0
    if options.device in ("cpu", "mps"):
        gpus = 0
    slots = int(available // gpus) if gpus else int(resources.get("CPU", 0))
    if slots < 1:
        needed = f"{gpus} GPUs" if gpus else "one CPU"
        raise pytest.UsageError(
            f"--lmcompose-engine=ray: a task needs {needed}, the cluster has fewer; see --lmcompose-gpus-per-worker"
        )
    return gpus, slots


def _root(found: Sequence[Part], number: int) -> float:
    """Return the cost of the first part in the chain that leads to this one."""
    after = found[number].after
    return found[number].cost if after is None else _root(found, after)


def _stop(session: pytest.Session) -> None:
    """Stop the run if a reporter requested it, as pytest's own loop does."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Connect to the cluster of RAY_ADDRESS, or to one on this machine, which is started if needed."""
    import ray

    connected = ray.is_initialized()
    if not connected:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()
