"""Hooks and fixtures of the plugin. Imports neither torch nor Hydra.

Anything that imports torch comes later, so this is the place for its defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.options import add_options, read_options
from pytest_lmcompose.parallel import threads
from pytest_lmcompose.session import BASELINE_INPUT, PLAN_OUTPUT, Planned, Session

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.results import Gate
    from pytest_lmcompose.states.build import ModelState

CATEGORIES = ("edit", "unlearn", "compress")
_HOLDS_FAILURES = re.compile(r"contains \d+ failed subtests?")
"""All that pytest says of a test whose subtests failed."""
SESSION = pytest.StashKey[Session]()

threads.set_defaults(os.environ, threads.available_cores())


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True)  # around xdist's own, which asks how many workers to start
def pytest_cmdline_main(config: pytest.Config) -> Iterator[None]:
    if any(getattr(config.option, name, None) for name in ("numprocesses", "tx")):  # which xdist defines
        from pytest_lmcompose.parallel.schedule import Workers

        workers = Workers(lambda: config.stash[SESSION], partial(read_options, config))
        config.pluginmanager.register(workers, "lmcompose-workers")
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    for category in CATEGORIES:
        config.addinivalue_line("markers", f"{category}: compositions with a step that does this (lmcompose)")
    options = read_options(config)
    session = Session(config, options)
    config.stash[SESSION] = session
    config.pluginmanager.register(_Reporting(session), "lmcompose-reporting")
    for variable, path in options.engines:  # where engines look for it, in this process and in its workers
        if variable not in os.environ:
            os.environ[variable] = path
            config.add_cleanup(partial(_forget, variable))
    if options.given:
        session.check()
    if options.plan:  # made in this process alone
        config.option.dist, config.option.tx = "no", []
    if session.writes:
        session.check_outputs()
    if options.engine == "ray" and session.writes and not options.plan:
        from pytest_lmcompose.cluster.engine import RayEngine

        config.pluginmanager.register(RayEngine(config, session), "lmcompose-ray")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "composition" not in metafunc.fixturenames:
        return
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if "composition" in (names.replace(" ", "").split(",") if isinstance(names, str) else names):
            return
    compositions = metafunc.config.stash[SESSION].compositions()
    metafunc.parametrize("composition", compositions, indirect=True, ids=str)


def pytest_itemcollected(item: pytest.Item) -> None:
    composition = composition_of(item)
    if composition is not None:
        for category in item.config.stash[SESSION].categories(composition):
            item.add_marker(category)


@pytest.hookimpl(trylast=True)  # of what -k, -m and other plugins leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = config.stash[SESSION]
    own.planned = planned(items)
    if (here := own.here([(item.nodeid, composition_of(item)) for item in items])) is None:
        return
    left = [item for item, ours in zip(items, here, strict=True) if not ours]
    own.elsewhere = _judged(left)
    items[:] = [item for item, ours in zip(items, here, strict=True) if ours]
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(tryfirst=True)  # before the terminal asks for the line about what was collected
def pytest_collection_finish(session: pytest.Session) -> None:
    tested = [found for item in session.items if (found := composition_of(item)) is not None]
    session.config.stash[SESSION].pytest = session
    session.config.stash[SESSION].expect(tested)
    own = session.config.stash[SESSION]
    own.judged = _judged(session.items)
    if own.writes and not own.options.plan and not session.config.option.collectonly:
        for problem in own.unmatched():
            raise pytest.UsageError(f"lmcompose: {problem}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not config.stash[SESSION].options.plan or session.testsfailed or reporter is None:
        return None
    config.stash[SESSION].write_plan(reporter)
    return True


def pytest_report_header(config: pytest.Config) -> list[str]:
    return config.stash[SESSION].header()


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    return config.stash[SESSION].announced()


@pytest.fixture
def composition(request: pytest.FixtureRequest) -> Composition:
    """The composition under test, from the suite or by indirect parametrisation with its id."""
    found = composition_of(request.node)
    assert found is not None, "this fixture is parametrised; see --lmcompose-compose"
    return found


@pytest.fixture
def base_model(request: pytest.FixtureRequest) -> ModelState:
    """The model before any step: a second one in memory, so that both states can be compared."""
    return request.config.stash[SESSION].pristine()


@pytest.fixture
def intervened_model(request: pytest.FixtureRequest, composition: Composition) -> ModelState:
    """The model in the state of `composition`, built step by step."""
    return request.config.stash[SESSION].state(composition)


@pytest.fixture
def measurements(request: pytest.FixtureRequest, composition: Composition) -> tuple[Measurement, ...]:
    """What the evaluators of the recipe found on the state of `composition`."""
    return request.config.stash[SESSION].measurements(composition)


@pytest.fixture
def gates(request: pytest.FixtureRequest, composition: Composition) -> tuple[Gate, ...]:
    """The verdicts of the thresholds on `measurements`."""
    return request.config.stash[SESSION].gates(composition)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        yield
    finally:
        item.config.stash[SESSION].send(item)
        if (composition := composition_of(item)) is not None:
            item.config.stash[SESSION].describe(item, composition)
            following = None if nextitem is None else composition_of(nextitem)
            item.config.stash[SESSION].tested(composition, following)


class _Reporting:
    """The hooks that need the config, which reports do not carry."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._session.receive(report)

    @pytest.hookimpl(wrapper=True)  # around pytest's own, which finds out that subtests have failed
    def pytest_report_teststatus(self, report: pytest.TestReport) -> Generator[None, Any, Any]:
        """Count a failed gate once: its subtest has failed, and the test that holds it says only so."""
        found = yield
        if self._session.in_use and report.failed and _HOLDS_FAILURES.fullmatch(str(report.longrepr)):
            return "", "", ""
        return found

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if (plan := getattr(node, "workeroutput", {}).get(PLAN_OUTPUT)) is not None:
            self._session.planned = Planned(*map(tuple, plan))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        baseline = self._session.baseline_for_workers()
        if baseline is not None:
            node.workerinput[BASELINE_INPUT] = baseline


@pytest.hookimpl(tryfirst=True)  # before the JUnit file is written
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    output, plan = getattr(session.config, "workeroutput", None), session.config.stash[SESSION].planned
    if output is not None and plan is not None:
        output[PLAN_OUTPUT] = [list(plan.tested), list(plan.judged)]
    session.config.stash[SESSION].closing.finish(session, exitstatus)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    config.stash[SESSION].closing.summarise(terminalreporter)


def _forget(variable: str) -> None:
    os.environ.pop(variable, None)


def planned(items: Iterable[pytest.Item]) -> Planned:
    """Return what tests are about, and which of them ask for gates."""
    items = list(items)
    tested = (found.id for item in items if (found := composition_of(item)) is not None)
    return Planned(tuple(dict.fromkeys(tested)), tuple(dict.fromkeys(c.id for c in _judged(items))))


def _judged(items: Iterable[pytest.Item]) -> tuple[Composition, ...]:
    """Return the compositions of the tests that ask for gates."""
    return tuple(
        found
        for item in items
        if "gates" in getattr(item, "fixturenames", ()) and (found := composition_of(item)) is not None
    )


def composition_of(item: pytest.Item) -> Composition | None:
    """Return the composition that a test is about, if it is about one."""
    callspec = getattr(item, "callspec", None)
    parameter = None if callspec is None else callspec.params.get("composition")
    if isinstance(parameter, str):
        return item.config.stash[SESSION].read(parameter)
    return parameter if isinstance(parameter, Composition) else None
