"""The controller of a run on a Ray cluster: parts of the plan go out as tasks, reports of tests come in.

A task starts where its start state is, in the object store of a node. If a node dies, Ray runs its tasks on
another one, and makes again what was lost with it. Imports Ray when the tests begin.
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
"""How often a task is run again on another node when its own dies."""
PARTS_PER_TASK = 2
"""Parts that a run is divided into, for each task that the cluster can do at once: so that none waits long."""
WORTH_A_PROCESS = 30.0
"""Seconds of work: a process takes some ten to import torch, and the time to load the model."""
_FORWARDED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")


class RayEngine:
    """Runs the tests of compositions on the cluster, and all others here."""

    def __init__(self, config: pytest.Config, session: Session) -> None:
        """Take over the tests of `session`; raises pytest.UsageError for flags that do not go with it."""
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
        """Start a task for each part; return the ids of its tests by the reference of its outcome."""
        options = self._session.options
        gpus, slots = _slots(ray.cluster_resources(), options)
        costs = self._session.costs()
        least = WORTH_A_PROCESS if costs.methods or costs.evaluation else 0.0  # else all count alike
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
        # A part stands behind the one that it waits for; of the others, what leads to most work goes first.
        for number in sorted(range(len(found)), key=lambda i: (-_root(found, i), i)):
            part = found[number]
            chosen = [test for composition in part.compositions for test in tests[composition]]
            before = [] if part.after is None else [states[part.after]]
            leaves = None if part.leaves is None else part.leaves.id
            outcome, states[number] = task.remote(shared, f"part{number + 1}", chosen, leaves, *before)
            waiting[outcome] = chosen
        return waiting

    def _receive(self, ray: Any, reference: Any, tests: Sequence[str], session: pytest.Session) -> None:
        """Take in what came of a task."""
        try:
            outcome: Outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            for test in tests:
                self._fail(test, f"the task that runs this test was lost: {error}")
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
        if not (session.shouldfail or session.shouldstop):  # as -x leaves tests out
            for test in outcome.unreported:
                self._fail(test, f"was not run on {outcome.node}:\n{outcome.output}")

    def _fail(self, test: str, message: str) -> None:
        item = self._items[test]
        report = pytest.TestReport(test, item.location, dict(item.keywords), "failed", message, "call")
        self._config.hook.pytest_runtest_logreport(report=report)


def _slots(resources: dict[str, float], options: Options) -> tuple[int, int]:
    """Return the GPUs of each task, and how many tasks the cluster does at once; raises pytest.UsageError."""
    there = resources.get("GPU", 0)
    gpus = max(1, options.gpus_per_worker) if options.device.startswith("cuda") or there else 0
    if options.device in ("cpu", "mps"):
        gpus = 0
    slots = int(there // gpus) if gpus else int(resources.get("CPU", 0))
    if slots < 1:
        wanted = f"{gpus} GPUs" if gpus else "a CPU"
        raise pytest.UsageError(f"--lmcompose-engine=ray: the cluster has no room for a task, which takes {wanted}")
    return gpus, slots


def _root(found: Sequence[Part], number: int) -> float:
    """Return the cost of the part at the beginning of the way to this one."""
    while (after := found[number].after) is not None:
        number = after
    return found[number].cost


def _stop(session: pytest.Session) -> None:
    """End the run if a reporter asks for it, as pytest's own loop does."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Be connected to the cluster that RAY_ADDRESS or this machine names, or to a new one on this machine."""
    import ray

    connected = ray.is_initialized()
    if not connected:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()
