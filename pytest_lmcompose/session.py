"""Between pytest and the run: errors as pytest shows them, results across workers, the report.

Imports neither torch nor Hydra until a test, or an option, asks for a composition.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.options import Options, asked_for_distribution
from pytest_lmcompose.plan import Plan, Remaining
from pytest_lmcompose.report.json import Collected, document, write
from pytest_lmcompose.report.junit import add_suite_properties, junit_file, properties_of
from pytest_lmcompose.report.layout import chosen_metrics
from pytest_lmcompose.report.prompts import prompts
from pytest_lmcompose.report.record import PROPERTY, decode, encode
from pytest_lmcompose.report.sections import write_composability, write_paired
from pytest_lmcompose.report.terminal import Progress, write_summary
from pytest_lmcompose.report.write import write_reports

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.build import ModelState
    from pytest_lmcompose.gate import Verdict
    from pytest_lmcompose.history import Outcome
    from pytest_lmcompose.run import Run
    from pytest_lmcompose.thresholds import Unused

BASELINE_INPUT = "lmcompose_baseline"
"""Name under which workers are told which stored run the controller compares with."""
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
        self.elsewhere: tuple[Composition, ...] = ()
        """The same of tests that were collected, but run elsewhere."""
        self.outcome: Outcome | None = None
        """What came of the run among stored ones."""
        self.only: frozenset[str] | None = None
        """Ids of the tests that run here; None: all."""
        self._kept: str | None = None
        """Whether and where the run was stored, as it is told."""
        self._nothing_here = False
        self._config = config
        self._keeps_subtrees = not self.writes and not asked_for_distribution(config)
        """Whether the tests come from the plugin's own scheduler."""
        self._started = _now()
        self._sent: dict[Composition, str] = {}
        self.expect(())

    @cached_property
    def run(self) -> Run:
        from pytest_lmcompose.run import Run

        run = Run(self.options, Progress(self._config))
        run.baseline_chosen = getattr(self._config, "workerinput", {}).get(BASELINE_INPUT)
        return run

    def check(self) -> None:
        """Check all options before collection; raises pytest.UsageError."""
        keeping = self.options.keeping
        with _usage_errors():
            self.run.check()
            if self.writes and keeping.update:
                from pytest_lmcompose.history import check_tree

                check_tree(keeping, self._config.rootpath)
        if keeping.stores and self.options.shard is not None:
            raise pytest.UsageError("--lmcompose-shard: store the whole run, once lmcompose merge has joined it")

    def baseline_for_workers(self) -> str | None:
        """Return the file of the stored run to compare with, empty if there is none; None if none was looked for."""
        if "run" not in self.__dict__ or "baseline" not in self.run.__dict__:
            return None
        return "" if self.run.baseline is None else str(self.run.baseline.path)

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
        self.run.judged = self.run.judged or (*self.judged, *self.elsewhere)
        with _plain_failures():
            return self.run.gates(composition)

    def costs(self) -> Costs:
        """Return what earlier runs tell of the cost of steps and evaluations."""
        with _usage_errors():
            return self.run.costs

    def crashed(self, composition: Composition, message: str) -> None:
        """Keep, for the report, that a worker died in the test of `composition`."""
        from pytest_lmcompose.run import Result

        result = Result(composition)
        result.error = message
        self.collected.add(*decode(encode(result, None)))

    def expect(self, compositions: Sequence[Composition]) -> None:
        """Take note of the compositions of all tests of this process."""
        self._expected = compositions
        self._remaining = Remaining(compositions)

    def tested(self, composition: Composition, following: Composition | None) -> None:
        """Let go of the states that only a test that is over needed; `following` is the next test's, if known.

        What is counted are all tests. A worker gets some, depth first, and comes back to no subtree.
        """
        over = self._remaining.done(composition)
        if self._keeps_subtrees and following is not None:
            over = tuple(state for state in composition.prefixes() if state not in following.prefixes())
        if "run" in self.__dict__:
            compared = [p for c in self.run.compared_with(composition) for p in c.prefixes()]
            self.run.release((*over, *(state for state in compared if not self._remaining.needs(state))))

    def here(self, tests: Sequence[tuple[str, Composition | None]]) -> list[bool] | None:
        """Say which of the tests, given by id and composition, run here, or None for all.

        Tests without a composition run in the first shard.
        """
        shard, only = self.options.shard, self.only
        if only is not None:
            return [test in only for test, _ in tests]
        if shard is None:
            return None
        mine = shard.of(c for _, c in tests if c is not None)
        found = [c in mine if c is not None else shard.index == 1 for _, c in tests]
        self._nothing_here = bool(found) and not any(found)
        return found

    def header(self) -> list[str]:
        """Return what stands above the tests: the shard, and how far the run had come that is resumed."""
        shard = [] if self.options.shard is None else [f"lmcompose: shard {self.options.shard}"]
        return [*shard, *self._resumed(), *self._compared()]

    def _compared(self) -> list[str]:
        if not self.options.keeping.compares:
            return []
        baseline = self.run.baseline
        if baseline is None:
            return [f"lmcompose: no run that passed is stored in {self.options.keeping.storage} to compare with"]
        failed = f"; passed over, since they failed: {', '.join(baseline.passed_over)}" if baseline.passed_over else ""
        return [f"lmcompose: compared with {baseline.path}, of {baseline.document['started']}{failed}"]

    def _resumed(self) -> list[str]:
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

    def describe(self, item: pytest.Item, composition: Composition) -> None:
        """Tell JUnit what the test of a composition found."""
        result = self.run.results.get(composition) if "run" in self.__dict__ else None
        if result is not None:
            item.user_properties += properties_of(result)

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
        self.collected.shard = self.options.shard
        reported = path is not None or self.options.outputs.wanted or self.options.keeping.wanted or self._has_baseline
        # Intervals take long; without a report, nobody sees those of metrics that the terminal does not show.
        metrics = None if reported or junit_file(self._config) is not None else self._shown()
        self.collected.complete(self.options.seed, part=self.options.shard is not None, metrics=metrics)
        if self._nothing_here and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # fewer compositions than shards
        if self.collected.late and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        status = "interrupted" if stopped else "finished"
        if self.collected.records:
            add_suite_properties(self._config, self.collected, self.options.seed, status)
        if not reported:
            return
        self.collected.prompts = self._prompts()
        report = document(
            self.collected,
            self.run.recipe,
            seed=self.options.seed,
            repeats=self.options.repeats,
            started=self._started,
            finished=_now(),
            status=status,
        )
        tell = Progress(self._config)
        report |= self._among_stored(session, report)
        if path is not None:
            try:
                write(path, report)
            except OSError as error:
                tell(f"lmcompose: the report {path} could not be written: {error}")
                session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        baseline = self.run.baseline.document if self._has_baseline and self.run.baseline is not None else None
        if not write_reports(self.options.outputs, report, baseline, tell):
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    @property
    def _has_baseline(self) -> bool:
        return "run" in self.__dict__ and self.run.__dict__.get("baseline") is not None

    def _among_stored(self, session: pytest.Session, report: dict[str, Any]) -> dict[str, Any]:
        """Compare a finished run with stored ones, and store it; return what its report says of it."""
        if not self.collected.records:
            return {}
        from pytest_lmcompose.history import keep, outcome

        keeping, baseline = self.options.keeping, self.run.baseline
        self.outcome = outcome(report, baseline, keeping, self._judged)
        try:
            ok = session.exitstatus == pytest.ExitCode.OK
            self._kept = keep(report, keeping, baseline, self._config.rootpath, ok=ok)
        except OSError as error:
            self._kept = f"lmcompose: the run could not be stored in {keeping.storage}: {error}"
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        return self.outcome.sections() | {"unused_rules": [dataclasses.asdict(rule) for rule in self._unused()]}

    def summarise(self, reporter: pytest.TerminalReporter) -> None:
        """Write the table, if there is anything to tell."""
        records = list(self.collected.records.values())
        if records:
            write_summary(reporter, records, self._wanted, self.options.outputs.layout)
            write_paired(reporter, records, self.collected.late)
            write_composability(reporter, self.collected.composability, self._shown())
            self._write_compared(reporter)
        for path in (self.options.json, *self.options.outputs.files.values()):
            if path is not None and path.is_file():
                reporter.write_line(f"lmcompose report: {path}")

    def _prompts(self) -> list[dict[str, Any]]:
        """Return what the samples asked; none where the data cannot be read, which the tests have told."""
        from pytest_lmcompose.world import WorldError

        if not self.collected.records:
            return []
        try:
            data = dict(zip(self.run.seeds, self.run.data, strict=True))
        except (WorldError, OSError):
            return []
        recipe = self.run.recipe
        records = list(self.collected.records.values())
        return prompts(data, records, recipe.world.pools, recipe.evaluate.question_limit)

    def _write_compared(self, reporter: pytest.TerminalReporter) -> None:
        from pytest_lmcompose.report.compared import write_outcome, write_unused

        records = list(self.collected.records.values())
        if self.outcome is not None:
            write_outcome(reporter, self.outcome, records, every=self._config.option.verbose > 0)
        write_unused(reporter, self._unused())
        if self._kept is not None:
            reporter.write_line(self._kept)

    def _judged(self, composition: str, metric: str) -> bool:
        """Say whether a gate judges a metric of a composition."""
        return any(rule.covers(composition) and rule.judges(metric) and rule.bounds for rule in self.run.rules)

    def _unused(self) -> list[Unused]:
        """Return the rules that judged nothing."""
        from pytest_lmcompose.thresholds import unused

        found = self.collected.records.values()
        measured = {r["id"]: [m["metric"] for m in r["measurements"]] for r in found if r["status"] == "measured"}
        return unused(self.run.rules, measured) if measured else []

    def _shown(self) -> list[str]:
        """Return the metrics of the terminal's tables."""
        records = list(self.collected.records.values())
        return chosen_metrics(records, self._wanted, self.options.outputs.layout.columns)

    def _wanted(self, metric: str) -> bool:
        """Say whether the table shows a metric: those with a threshold, or all with -v or without any."""
        rules = self.run.rules
        return self._config.option.verbose > 0 or not rules or any(rule.judges(metric) for rule in rules)


@contextmanager
def _usage_errors() -> Iterator[None]:
    from pytest_lmcompose.recipe import RecipeError
    from pytest_lmcompose.storage import StorageError
    from pytest_lmcompose.thresholds import ThresholdError

    try:
        yield
    except (RecipeError, ThresholdError, StorageError) as error:
        raise pytest.UsageError(f"lmcompose: {error}") from None


@contextmanager
def _plain_failures() -> Iterator[None]:
    """Show errors whose message says everything without a traceback."""
    try:
        yield
    except Exception as error:
        if _says_everything(error):
            raise pytest.fail.Exception(str(error), pytrace=False) from error
        raise


def _says_everything(error: Exception) -> bool:
    from evaluators.measurement import EvaluationError
    from interventions.types import InterventionError
    from pytest_lmcompose.errors import BuildError
    from pytest_lmcompose.recipe import RecipeError
    from pytest_lmcompose.storage import StorageError
    from pytest_lmcompose.thresholds import ThresholdError
    from pytest_lmcompose.world import WorldError

    if isinstance(error, BuildError):
        return isinstance(error.__cause__, InterventionError)
    return isinstance(error, (RecipeError, ThresholdError, StorageError, WorldError, EvaluationError))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
