"""The plugin's state in one process: which tests run here, and results across workers.

Until a test or an option needs a composition, nothing imports torch, Hydra, or the packages `interventions` and
`evaluators`, whose names your project may use too (see `shadow`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import pytest

from pytest_lmcompose import shadow
from pytest_lmcompose.budget import Budget
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.failures import plain_failures, usage_errors
from pytest_lmcompose.options import Options, asked_for_distribution
from pytest_lmcompose.plan import Plan, Planned, Remaining, needed
from pytest_lmcompose.progress import Progress

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.baseline.reference import Baseline
    from pytest_lmcompose.build.states import ModelState
    from pytest_lmcompose.gate.evaluator import GateEvaluator
    from pytest_lmcompose.report.collect import Collected
    from pytest_lmcompose.results import Gate, Report
    from pytest_lmcompose.run import Run
    from pytest_lmcompose.steps import StepRecord

SESSION = pytest.StashKey["Session"]()
BASELINE_INPUT = "lmcompose_baseline"
"""Key of `workerinput`: the stored run that the controller compares with."""
PLAN_OUTPUT = "lmcompose_plan"
"""Key of `workeroutput`: the compositions of the whole run."""
PROPERTY = "lmcompose"
"""Name of the user property that carries results in test reports."""


class Session:
    """The plugin's state in one process; stored in `config.stash[SESSION]`."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.options = options
        self.exports = options.export
        """Where to export the tested compositions; None: nowhere."""
        self.progress = Progress(config)
        self.writes = not hasattr(config, "workerinput")
        """Whether this process writes the report, as the controller or the only process."""
        self.judged: tuple[Composition, ...] = ()
        """Compositions of the tests that use `gates`."""
        self.elsewhere: tuple[Composition, ...] = ()
        """Compositions with gates whose tests run in another shard or process."""
        self.planned: Planned | None = None
        """The compositions of the whole run, including all shards; a controller gets it from its workers."""
        self.only: frozenset[str] | None = None
        """Ids of the tests to run here; None: all."""
        self.config = config
        self.budget = None if options.budget is None else Budget(options.budget)
        """The time that is left for tests; None: any."""
        self._keeps_subtrees = not self.writes and not asked_for_distribution(config)
        """Whether `PrefixScheduling` sends the tests, so that this worker never returns to a subtree."""
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.pytest: pytest.Session | None = None
        """Set when the tests are collected."""
        self.begun = False
        """Whether any tests ran, here or in workers."""
        self.nothing_here = False
        """Whether this shard has no tests."""
        self.report: Report | None = None
        """The finished report, if there is one."""
        self._sent: dict[Composition, str] = {}
        self._run: Run | None = None
        self._collected: Collected | None = None
        self.expect(())

    @property
    def run(self) -> Run:
        """The run of this process; raises pytest.UsageError if other packages hide ours."""
        if self._run is None:
            _check_packages()
            from pytest_lmcompose.run import Run

            self._run = Run(self.options, self.progress, self.progress.doing, self._step_applied)
            self._run.baseline_chosen = getattr(self.config, "workerinput", {}).get(BASELINE_INPUT)
        return self._run

    @property
    def in_use(self) -> bool:
        """Whether this process uses the plugin."""
        return self._run is not None

    @property
    def collected(self) -> Collected:
        """The results of all processes."""
        if self._collected is None:
            from pytest_lmcompose.report.collect import Collected

            self._collected = Collected()
        return self._collected

    @property
    def has_results(self) -> bool:
        """Whether there may be results to report."""
        return self.in_use or self._collected is not None

    @cached_property
    def gate_evaluator(self) -> GateEvaluator:
        from pytest_lmcompose.gate.evaluator import GateEvaluator

        return GateEvaluator(self.run)

    def check_packages(self) -> None:
        """Raise pytest.UsageError if packages that collection imported hide ours."""
        if self.in_use:
            _check_packages()

    @property
    def baseline(self) -> Baseline | None:
        """The stored run to compare with, if there is one and it was read."""
        return self._run.baseline if self._run is not None and self._run.baseline_read else None

    def baseline_for_workers(self) -> str | None:
        """Return the file of the stored run to compare with; empty if there is none, None if none was read."""
        if self._run is None or not self._run.baseline_read:
            return None
        return "" if self.baseline is None else str(self.baseline.path)

    def compositions(self) -> tuple[Composition, ...]:
        """Return the compositions to test, in depth-first order."""
        with usage_errors():
            return Plan.of(self.run.compositions, self.run.recipe.reads).order

    def read(self, text: str) -> Composition:
        """Parse and check a composition id; raises pytest.UsageError."""
        with usage_errors():
            return self.run.read(text)

    def categories(self, composition: Composition) -> tuple[str, ...]:
        """Return the distinct categories of a composition's steps."""
        from interventions.registry import find_method

        return tuple(dict.fromkeys(find_method(step.method).category for step in composition.steps))

    def pristine(self) -> ModelState:
        """Return a second copy of the base model."""
        with self._working():
            return self.run.manager.pristine()

    def state(self, composition: Composition) -> ModelState:
        """Return the model in the state of `composition`."""
        with self._working():
            return self.run.state(composition)

    def measurements(self, composition: Composition) -> tuple[Measurement, ...]:
        """Return the measurements of `composition`."""
        with self._working():
            return self.run.measurements(composition)

    def gates(self, composition: Composition) -> tuple[Gate, ...]:
        """Return the gates of `composition`."""
        self.gate_evaluator.expected = self.gate_evaluator.expected or (*self.judged, *self.elsewhere)
        with self._working():
            return self.gate_evaluator.gates(composition)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Clear the status line afterwards, and convert errors to test failures."""
        if self.writes and not self.run.counter.expected:  # a worker does not know the others' progress
            self.run.counter.expected = frozenset(self.expected)
        try:
            with plain_failures(self._stop):
                yield
        finally:
            self.progress.clear()

    def _step_applied(self, composition: Composition, step: StepRecord) -> None:
        self.config.hook.pytest_lmcompose_step_applied(config=self.config, composition=composition, step=step)

    def _stop(self, reason: str) -> None:
        if self.pytest is not None:
            self.pytest.shouldstop = reason

    def costs(self) -> Costs:
        """Return the recorded costs of steps and evaluations."""
        with usage_errors():
            return self.run.costs

    def crashed(self, composition: Composition, message: str) -> None:
        """Record that a worker crashed in the test of `composition`."""
        from pytest_lmcompose.composition_run import Result
        from pytest_lmcompose.results import Message

        result = Result(composition)
        result.error = message
        self.collected.add(Message(None, result.record()))

    def expect(self, compositions: Sequence[Composition]) -> None:
        """Set the compositions of all tests of this process."""
        self.expected = compositions
        self._remaining = Remaining(compositions, lambda step: self.run.recipe.reads(step))

    def tested(self, composition: Composition, following: Composition | None) -> None:
        """Release the states that no remaining test needs; `following` is the next test's composition, if known.

        The count includes all tests. A worker gets only some, but depth first, so it never returns to a subtree.
        """
        over = self._remaining.done(composition)
        if self._keeps_subtrees and following is not None:
            reads = self.run.recipe.reads
            after = set(needed(following, reads))
            over = tuple(state for state in needed(composition, reads) if state not in after)
        if self.in_use:
            compared = [p for c in self.gate_evaluator.compared_with(composition) for p in c.prefixes()]
            self.run.release((*over, *(state for state in compared if not self._remaining.needs(state))))

    def here(self, tests: Sequence[tuple[str, Composition | None]]) -> list[bool] | None:
        """Return for each test, an id and a composition, whether it runs here; None if all do.

        Tests without a composition run in the first shard.
        """
        shard, only = self.options.shard, self.only
        if only is not None:
            return [test in only for test, _ in tests]
        if shard is None:
            return None
        mine = shard.of(c for _, c in tests if c is not None)
        found = [c in mine if c is not None else shard.index == 1 for _, c in tests]
        self.nothing_here = bool(found) and not any(found)
        return found

    def most_telling_first(self, compositions: Sequence[Composition]) -> list[Composition]:
        """Sort compositions by what their measurement is expected to tell."""
        from pytest_lmcompose.prediction.records import in_order_of_information

        with usage_errors():
            return in_order_of_information(compositions, self.run.predicted(compositions))

    def in_time(self, composition: Composition) -> bool:
        """Return whether the time for this run suffices to test `composition` too."""
        return self.budget is None or self.budget.fits(composition, self.costs(), self.run.recipe.reads)

    def write_plan(self, reporter: pytest.TerminalReporter) -> None:
        """Print the plan of the collected tests."""
        reporter.ensure_newline()
        for line in self.run.plan(self.expected):
            reporter.write_line(line)

    def exported(self, composition: Composition) -> bool:
        """Return whether `composition` is exported where exports are wanted: the base model only if it is named."""
        return bool(composition.steps) or composition.id in self.options.compose

    def export(self, composition: Composition) -> None:
        """Export the state of `composition` if that is wanted and a test has built it."""
        result = self.run.results.get(composition) if self.exports is not None and self.in_use else None
        if self.exports is None or result is None or result.state_hash is None or result.error is not None:
            return
        if not self.exported(composition):
            return
        from pytest_lmcompose.checkpoints.export import export_composition

        with self._working():
            export_composition(self.run, composition, self.exports)

    def send(self, item: pytest.Item) -> None:
        """Attach new results to the reports of a test, the only channel that survives a crash."""
        if not self.in_use:
            return
        from pytest_lmcompose.results import Message, encode

        touched, self.run.touched = self.run.touched, {}
        for composition, result in touched.items():
            text = encode(Message(self.run.model_facts(), result.record()))
            if self._sent.get(composition) != text:
                self._sent[composition] = text
                item.user_properties.append((PROPERTY, text))

    def describe(self, item: pytest.Item, composition: Composition) -> None:
        """Add the results of a composition to its test in the JUnit file."""
        result = self.run.results.get(composition) if self.in_use else None
        if result is not None:
            from pytest_lmcompose.report.junit import properties_of

            item.user_properties += properties_of(result)

    def receive(self, report: pytest.TestReport) -> None:
        """Move the results from a test's report to `collected`, so that no other reporter prints them."""
        if not self.writes:
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                from pytest_lmcompose.results import decode_message

                message = decode_message(str(value))
                self.collected.add(message)
                record = message.composition
                if record.status == "measured":
                    if self.run.journal is not None:
                        self.run.journal.finished(record.id)
                    self.config.hook.pytest_lmcompose_composition_measured(config=self.config, record=record)
        report.user_properties = [pair for pair in report.user_properties if pair[0] != PROPERTY]


def _check_packages() -> None:
    if (problem := shadow.hidden()) is not None:
        raise pytest.UsageError(f"lmcompose: {problem}")


def composition_of(item: pytest.Item) -> Composition | None:
    """Return the composition of a test, or None; public, for plugins and conftest files."""
    callspec = getattr(item, "callspec", None)
    parameter = None if callspec is None else callspec.params.get("composition")
    if isinstance(parameter, str):
        return item.config.stash[SESSION].read(parameter)
    return parameter if isinstance(parameter, Composition) else None
