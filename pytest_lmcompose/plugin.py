"""Hooks and fixtures of the plugin. Imports neither torch nor Hydra.

Anything that imports torch comes later, so this is the place for its defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_lmcompose import threads
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.options import add_options, check_writable, read_options
from pytest_lmcompose.session import Session

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.build import ModelState
    from pytest_lmcompose.gate import Verdict

CATEGORIES = ("edit", "unlearn", "compress")
SESSION = pytest.StashKey[Session]()

threads.set_defaults(os.environ, threads.available_cores())


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


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
    if options.json is not None and session.writes:
        check_writable(options.json)


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
    composition = _composition_of(item)
    if composition is not None:
        for category in item.config.stash[SESSION].categories(composition):
            item.add_marker(category)


def pytest_collection_finish(session: pytest.Session) -> None:
    tested = [found for item in session.items if (found := _composition_of(item)) is not None]
    session.config.stash[SESSION].expect(tested)
    session.config.stash[SESSION].judged = tuple(
        found
        for item in session.items
        if "gates" in getattr(item, "fixturenames", ()) and (found := _composition_of(item)) is not None
    )


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


@pytest.fixture
def composition(request: pytest.FixtureRequest) -> Composition:
    """The composition under test, from the suite or by indirect parametrisation with its id."""
    found = _composition_of(request.node)
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
def gates(request: pytest.FixtureRequest, composition: Composition) -> tuple[Verdict, ...]:
    """The verdicts of the thresholds on `measurements`."""
    return request.config.stash[SESSION].gates(composition)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    try:
        yield
    finally:
        item.config.stash[SESSION].send(item)
        if (composition := _composition_of(item)) is not None:
            item.config.stash[SESSION].tested(composition)


class _Reporting:
    """The hooks that need the config, which reports do not carry."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._session.receive(report)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[SESSION].finish(session, exitstatus)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    config.stash[SESSION].summarise(terminalreporter)


def _forget(variable: str) -> None:
    os.environ.pop(variable, None)


def _composition_of(item: pytest.Item) -> Composition | None:
    callspec = getattr(item, "callspec", None)
    parameter = None if callspec is None else callspec.params.get("composition")
    if isinstance(parameter, str):
        return item.config.stash[SESSION].read(parameter)
    return parameter if isinstance(parameter, Composition) else None
