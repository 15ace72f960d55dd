"""Between pytest and the run: errors as pytest shows them, results across workers, the report.

Imports neither torch nor Hydra until a test, or an option, asks for a composition.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.options import Options
from pytest_lmcompose.plan import Plan, Remaining
from pytest_lmcompose.report.json import Collected, document, write
from pytest_lmcompose.report.record import PROPERTY, decode, encode
from pytest_lmcompose.report.sections import write_composability, write_paired
from pytest_lmcompose.report.terminal import Progress, shown_metrics, write_summary

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.build import ModelState
    from pytest_lmcompose.gate import Verdict
    from pytest_lmcompose.run import Run

_STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)


class Session:
    """The plugin's state in one process; it sits in the config's stash."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.options = options
        self.collected = Collected()
        self.writes = not hasattr(config, "workerinput")
        """Whether this process writes the report: the controller, or the only one."""
        self.judged: tuple[Composition, ...] = ()
        """Compositions of the tests that ask for gates."""
        self._config = config
        self._started = _now()
        self._sent: dict[Composition, str] = {}
        self.expect(())

    @cached_property
    def run(self) -> Run:
        from pytest_lmcompose.run import Run

        return Run(self.options, Progress(self._config))

    def check(self) -> None:
        """Check all options before collection; raises pytest.UsageError."""
        with _usage_errors():
            self.run.check()

    def compositions(self) -> tuple[Composition, ...]:
        """Return the compositions to test, those that share prefixes together."""
        with _usage_errors():
            return Plan.of(self.run.compositions).order

    def read(self, text: str) -> Composition:
        """Parse and check the id of a composition; raises pytest.UsageError."""
        with _usage_errors():
            return self.run.recipe.read(text)

    def categories(self, composition: Composition) -> tuple[str, ...]:
        """Return the categories of a composition's steps, without repetition."""
        from interventions.registry import find_method

        return tuple(dict.fromkeys(find_method(step.method).category for step in composition.steps))

    def pristine(self) -> ModelState:
        """Return the base model as a second one in memory."""
        with _plain_failures():
            return self.run.manager.pristine()

    def state(self, composition: Composition) -> ModelState:
        """Return the model in the state of `composition`."""
        with _plain_failures():
            return self.run.state(composition)

    def measurements(self, composition: Composition) -> tuple[Measurement, ...]:
        """Return the measurements of `composition`."""
        with _plain_failures():
            return self.run.measurements(composition)

    def gates(self, composition: Composition) -> tuple[Verdict, ...]:
        """Return the verdicts on `composition`."""
        self.run.judged = self.judged
        with _plain_failures():
            return self.run.gates(composition)

    def expect(self, compositions: Sequence[Composition]) -> None:
        """Take note of the compositions of all tests of this process."""
        self._expected = compositions
        self._remaining = Remaining(compositions)

    def tested(self, composition: Composition) -> None:
        """Let go of the states that only a test that is over needed."""
        over = self._remaining.done(composition)
        if "run" in self.__dict__:
            self.run.release(over)

    def header(self) -> list[str]:
        """Return what stands above the tests: how far the run had come that is resumed."""
        if not self.options.resume:
            return []
        with _usage_errors():
            journal = self.run.journal
        left = journal.interrupted() if journal is not None else None
        if left is None:
            return ["lmcompose: no interrupted run with these options; what the store has is read"]
        began = datetime.datetime.fromtimestamp(left.began).isoformat(" ", "seconds")
        return [f"lmcompose: resuming the run of {began}: {len(left.finished)} compositions had finished"]

    def write_plan(self, reporter: pytest.TerminalReporter) -> None:
        """Print the plan of the tests that were collected."""
        reporter.ensure_newline()
        for line in self.run.plan(self._expected):
            reporter.write_line(line)

    def send(self, item: pytest.Item) -> None:
        """Attach what is new to the reports of a test: the only channel that survives a crash."""
        if "run" not in self.__dict__:
            return
        touched, self.run.touched = self.run.touched, {}
        for composition, result in touched.items():
            text = encode(result, self.run.model_facts())
            if self._sent.get(composition) != text:
                self._sent[composition] = text
                item.user_properties.append((PROPERTY, text))

    def receive(self, report: pytest.TestReport) -> None:
        """Take the results out of a test's report, so that no other reporter prints them."""
        if not self.writes:
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                model, record = decode(str(value))
                self.collected.add(model, record)
                if record["status"] == "measured" and self.run.journal is not None:
                    self.run.journal.finished(record["id"])
        report.user_properties = [pair for pair in report.user_properties if pair[0] != PROPERTY]

    def finish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, also of a run that failed or was interrupted."""
        path = self.options.json
        if not self.writes or self._config.option.collectonly or self.options.plan:
            return
        stopped = exitstatus in _STOPPED or bool(session.shouldstop or session.shouldfail)
        if self.collected.records and self.run.journal is not None and not stopped:
            self.run.journal.ended()
        if "run" in self.__dict__:  # what an interrupted test had done, and no report tells
            for result in self.run.touched.values():
                self.collected.add(*decode(encode(result, self.run.model_facts())))
        self.collected.complete(self.options.seed)
        if self.collected.late and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if path is None:
            return
        report = document(
            self.collected,
            self.run.recipe,
            seed=self.options.seed,
            repeats=self.options.repeats,
            started=self._started,
            finished=_now(),
            status="interrupted" if stopped else "finished",
        )
        try:
            write(path, report)
        except OSError as error:
            Progress(self._config)(f"lmcompose: the report {path} could not be written: {error}")
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def summarise(self, reporter: pytest.TerminalReporter) -> None:
        """Write the table, if there is anything to tell."""
        records = list(self.collected.records.values())
        if records:
            write_summary(reporter, records, self._wanted)
            write_paired(reporter, records, self.collected.late)
            write_composability(reporter, self.collected.composability, shown_metrics(records, self._wanted))
        if self.options.json is not None and self.options.json.is_file():
            reporter.write_line(f"lmcompose report: {self.options.json}")

    def _wanted(self, metric: str) -> bool:
        """Say whether the table shows a metric: those with a threshold, or all with -v or without any."""
        rules = self.run.rules
        return self._config.option.verbose > 0 or not rules or any(rule.judges(metric) for rule in rules)


@contextmanager
def _usage_errors() -> Iterator[None]:
    from pytest_lmcompose.gate import ThresholdError
    from pytest_lmcompose.recipe import RecipeError

    try:
        yield
    except (RecipeError, ThresholdError) as error:
        raise pytest.UsageError(f"lmcompose: {error}") from None


@contextmanager
def _plain_failures() -> Iterator[None]:
    """Show errors whose message says everything without a traceback."""
    from evaluators.measurement import EvaluationError
    from interventions.types import InterventionError
    from pytest_lmcompose.errors import BuildError
    from pytest_lmcompose.gate import ThresholdError
    from pytest_lmcompose.recipe import RecipeError
    from pytest_lmcompose.world import WorldError

    try:
        yield
    except (RecipeError, ThresholdError, WorldError, EvaluationError) as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from error
    except BuildError as error:
        if isinstance(error.__cause__, InterventionError):
            raise pytest.fail.Exception(str(error), pytrace=False) from error
        raise


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
