"""Hooks and fixtures of the plugin. Imports neither torch nor Hydra, nor the packages in `shadow.PACKAGES`.

Sets the defaults of torch's threads, because pytest loads this module before anything imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmcompose import hookspec, session_checks, session_header
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.distribute import threads
from pytest_lmcompose.options import LOCAL, add_options, read_options
from pytest_lmcompose.plan import Planned
from pytest_lmcompose.session import BASELINE_INPUT, PLAN_OUTPUT, Session, composition_of
from pytest_lmcompose.session import SESSION as SESSION

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.build.states import ModelState
    from pytest_lmcompose.results import Gate
    from pytest_lmcompose.session_report import SessionReport

CATEGORIES = ("edit", "unlearn", "compress", "checkpoint", "merge", "tune", "steer")
_HAS_FAILED_SUBTESTS = re.compile(r"contains \d+ failed subtests?")
"""The whole error of a test that only failed because of its subtests."""
COMPOSED = "lmcompose_composition"
"""Attribute of test reports: the id of the composition."""

threads.set_defaults(os.environ, threads.available_cores())


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspec)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True)  # before xdist asks for the number of workers
def pytest_cmdline_main(config: pytest.Config) -> Iterator[None]:
    if any(getattr(config.option, name, None) for name in ("numprocesses", "tx")):  # xdist's options
        from pytest_lmcompose.distribute.schedule import Workers

        workers = Workers(lambda: config.stash[SESSION], partial(read_options, config))
        config.pluginmanager.register(workers, "lmcompose-workers")
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    for category in CATEGORIES:
        _add_marker(config, category)
    options = read_options(config)
    session = Session(config, options)
    config.stash[SESSION] = session
    config.pluginmanager.register(_Reporting(session), "lmcompose-reporting")
    for variable, path in options.engines:  # for this process and its workers
        if variable not in os.environ:
            os.environ[variable] = path
            config.add_cleanup(partial(_forget, variable))
    if options.given:
        session_checks.check(session)
    if options.plan:  # no workers
        config.option.dist, config.option.tx = "no", []
    if session.writes:
        session_checks.check_outputs(session)
        session_checks.check_exports(session)
    if session.writes and options.outputs.tracking is not None:
        from pytest_lmcompose.report.wandb import Tracker

        config.pluginmanager.register(Tracker(options.outputs.tracking, session.progress), "lmcompose-wandb")
    if session.writes and options.engine != LOCAL and not options.plan:
        engine = config.hook.pytest_lmcompose_make_engine(config=config, name=options.engine)
        if engine is None:
            raise pytest.UsageError(
                f"--lmcompose-engine={options.engine}: there is no such engine; use {LOCAL}, ray or an engine of an "
                "installed plugin"
            )
        config.pluginmanager.register(engine, "lmcompose-engine")


def pytest_lmcompose_make_engine(config: pytest.Config, name: str) -> object | None:
    if name != "ray":
        return None
    from pytest_lmcompose.distribute.ray.engine import RayEngine

    return RayEngine(config, config.stash[SESSION])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "composition" not in metafunc.fixturenames:
        return
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if "composition" in (names.replace(" ", "").split(",") if isinstance(names, str) else names):
            return
    try:
        compositions = metafunc.config.stash[SESSION].compositions()
    except pytest.UsageError as error:  # reported as a collection error without a traceback
        raise pytest.Collector.CollectError(str(error)) from None
    metafunc.parametrize("composition", compositions, indirect=True, ids=str)


def pytest_itemcollected(item: pytest.Item) -> None:
    composition = composition_of(item)
    for category in () if composition is None else item.config.stash[SESSION].categories(composition):
        if category not in CATEGORIES:  # from another package
            _add_marker(item.config, category)
        item.add_marker(category)


@pytest.hookimpl(trylast=True)  # after -k, -m and other plugins
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = config.stash[SESSION]
    own.planned = planned(items)
    here = own.here([(item.nodeid, composition_of(item)) for item in items])
    if here is not None:
        _leave_out(config, items, here)
    if own.budget is not None and not config.option.collectonly:
        found = [composition_of(item) for item in items]
        order = own.most_telling_first(list(dict.fromkeys(c for c in found if c is not None)))
        place = {composition: number for number, composition in enumerate(order)}
        items.sort(key=lambda item: -1 if (c := composition_of(item)) is None else place[c])


def _leave_out(config: pytest.Config, items: list[pytest.Item], here: Sequence[bool]) -> None:
    """Remove the tests that run elsewhere."""
    own = config.stash[SESSION]
    left = [item for item, ours in zip(items, here, strict=True) if not ours]
    own.elsewhere = _judged(left)
    items[:] = [item for item, ours in zip(items, here, strict=True) if ours]
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(tryfirst=True)  # before the terminal reports the collection
def pytest_collection_finish(session: pytest.Session) -> None:
    tested = [found for item in session.items if (found := composition_of(item)) is not None]
    session.config.stash[SESSION].pytest = session
    session.config.stash[SESSION].expect(tested)
    own = session.config.stash[SESSION]
    own.judged = _judged(session.items)
    own.check_packages()
    if own.writes and not own.options.plan and not session.config.option.collectonly:
        for problem in (*session_checks.unmatched(own), *session_checks.unpackable(own, tested)):
            raise pytest.UsageError(f"lmcompose: {problem}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    own, reporter = session.config.stash[SESSION], session.config.pluginmanager.get_plugin("terminalreporter")
    if not own.options.plan or session.testsfailed or reporter is None:
        return None
    own.write_plan(reporter)
    return True


def pytest_report_header(config: pytest.Config) -> list[str]:
    return session_header.header(config.stash[SESSION])


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    return session_header.announced(config.stash[SESSION])


@pytest.fixture
def composition(request: pytest.FixtureRequest) -> Composition:
    """The composition under test: from the suite, or an id by indirect parametrisation."""
    found = composition_of(request.node)
    assert found is not None, "this fixture is parametrised; see --lmcompose-compose"
    return found


@pytest.fixture
def base_model(request: pytest.FixtureRequest) -> ModelState:
    """The base model as a second copy in memory, so you can compare it with `intervened_model`."""
    return request.config.stash[SESSION].pristine()


@pytest.fixture
def intervened_model(request: pytest.FixtureRequest, composition: Composition) -> ModelState:
    """The model after all steps of `composition`."""
    return request.config.stash[SESSION].state(composition)


@pytest.fixture
def measurements(request: pytest.FixtureRequest, composition: Composition) -> tuple[Measurement, ...]:
    """The measurements of `composition` by the recipe's evaluators."""
    return request.config.stash[SESSION].measurements(composition)


@pytest.fixture
def gates(request: pytest.FixtureRequest, composition: Composition) -> tuple[Gate, ...]:
    """The results of the gates of `composition`: its measurements compared with the thresholds."""
    return request.config.stash[SESSION].gates(composition)


def pytest_runtest_setup(item: pytest.Item) -> None:
    session, composition = item.config.stash[SESSION], composition_of(item)
    if composition is not None and not session.in_time(composition):
        pytest.skip("not run: it does not fit into what is left of --lmcompose-budget")
    if composition is not None and not session.writes:  # otherwise it was a usage error
        for problem in session_checks.unpackable(session, [composition]):
            pytest.fail(problem, pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        yield
    finally:
        session, composition = item.config.stash[SESSION], composition_of(item)
        try:
            if composition is not None:
                session.export(composition)
        finally:
            session.send(item)
            if composition is not None:
                session.describe(item, composition)
                following = None if nextitem is None else composition_of(nextitem)
                session.tested(composition, following)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the composition to the report, which another process may show."""
    report = yield
    if (composition := composition_of(item)) is not None:
        setattr(report, COMPOSED, composition.id)
    return report


class _Reporting:
    """Hooks that get no config to find the session in, and hooks for the end of the run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._closing: SessionReport | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around the engine
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        self._session.begun = not (session.testsfailed or session.config.option.collectonly)
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._session.receive(report)

    @pytest.hookimpl(wrapper=True)  # around pytest's own hook for subtests
    def pytest_report_teststatus(self, report: pytest.TestReport) -> Generator[None, Any, Any]:
        """Count a failed gate once: as a subtest, and not also as the test around it."""
        found = yield
        if report.failed and hasattr(report, COMPOSED) and _HAS_FAILED_SUBTESTS.fullmatch(str(report.longrepr)):
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
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        own, config = self._session, session.config
        output, plan = getattr(config, "workeroutput", None), own.planned
        if output is not None and plan is not None:
            output[PLAN_OUTPUT] = [list(plan.tested), list(plan.judged)]
        if not own.has_results:
            return
        from pytest_lmcompose.session_report import SessionReport

        self._closing = SessionReport(own)
        self._closing.finish(session, exitstatus)
        if own.report is not None:
            baseline = None if own.baseline is None else own.baseline.report
            config.hook.pytest_lmcompose_report(config=config, report=own.report, baseline=baseline)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._closing is None:
            return
        self._closing.summarise(terminalreporter)
        if (report := self._session.report) is not None:
            hook = self._session.config.hook
            hook.pytest_lmcompose_terminal_summary(terminalreporter=terminalreporter, report=report)


def _add_marker(config: pytest.Config, category: str) -> None:
    config.addinivalue_line("markers", f"{category}: compositions with a step of this category (lmcompose)")


def _forget(variable: str) -> None:
    os.environ.pop(variable, None)


def planned(items: Iterable[pytest.Item]) -> Planned:
    """Return the compositions that are tested, and those with gates."""
    items = list(items)
    tested = (found.id for item in items if (found := composition_of(item)) is not None)
    return Planned(tuple(dict.fromkeys(tested)), tuple(dict.fromkeys(c.id for c in _judged(items))))


def _judged(items: Iterable[pytest.Item]) -> tuple[Composition, ...]:
    """Return the compositions of the tests that use `gates`."""
    return tuple(
        found
        for item in items
        if "gates" in getattr(item, "fixturenames", ()) and (found := composition_of(item)) is not None
    )
