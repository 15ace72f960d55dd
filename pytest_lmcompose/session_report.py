"""End a session: write the report, compare and store the run, write the terminal summary."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_lmcompose import hookspec as hooks
from pytest_lmcompose import session_checks
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.gate.advice import advice
from pytest_lmcompose.report import github
from pytest_lmcompose.report.collect import make_report, now, write
from pytest_lmcompose.report.files import TargetError
from pytest_lmcompose.report.junit import add_suite_properties, junit_file
from pytest_lmcompose.report.layout import chosen_metrics
from pytest_lmcompose.report.prompts import prompts
from pytest_lmcompose.report.sections import write_closeness, write_composability, write_paired
from pytest_lmcompose.report.terminal import write_summary
from pytest_lmcompose.report.write import write_reports
from pytest_lmcompose.results import Message, Plan, Prompts, Report, replace
from pytest_lmcompose.session_header import how_to_resume
from pytest_lmcompose.texts import counted, first_names

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.history import Outcome
    from pytest_lmcompose.gate.thresholds import Unused
    from pytest_lmcompose.session import Session

_NAMED = 8
"""Compositions to name in a line."""
_STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)


class SessionReport:
    """Reports a session after its tests."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._config = session.config
        self._options = session.options
        self._collected = session.collected
        self._stopped = False
        self._outcome: Outcome | None = None
        """The comparison with the stored run."""
        self._idle: list[str] = []
        """Errors for --lmcompose-compare-fail expressions that apply to no gate."""
        self._kept: str | None = None
        """Message that says where the run was stored."""

    def finish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, also if the run failed or was interrupted."""
        path = self._options.json
        if not self._session.writes or self._config.option.collectonly or self._options.plan:
            return
        stopped = exitstatus in _STOPPED or bool(session.shouldstop or session.shouldfail or self._left_out)
        self._stopped = stopped
        if self._collected.records and self._session.run.journal is not None and not stopped:
            self._session.run.journal.ended()
        if self._session.in_use:  # results of an interrupted test, which has no report
            for result in self._session.run.touched.values():
                self._collected.add(Message(self._session.run.model_facts(), result.record()))
        self._collected.shard = self._options.shard
        reported = (
            path is not None
            or self._options.outputs.wanted
            or self._options.baselines.wanted
            or self._session.baseline is not None
            or hooks.read_reports(self._config)
            or (self._options.outputs.github and bool(self._collected.records))
        )
        # Confidence intervals are slow: without a report, compute only those that the terminal shows.
        metrics = None if reported or junit_file(self._config) is not None else self._shown()
        self._collected.complete(self._options.seed, part=self._options.shard is not None, metrics=metrics)
        self._update_cards(session)
        if self._session.nothing_here and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # fewer compositions than shards
        self._idle = self._idle_expressions() if self._collected.records and not stopped else []
        if (self._collected.late or self._idle) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        status = "interrupted" if stopped else "finished"
        if self._collected.records:
            add_suite_properties(self._config, self._collected, self._options.seed, status)
        if not reported:
            return
        self._collected.prompts = self._prompts()
        self._collected.plan = self._plan()
        report = make_report(
            self._collected,
            self._session.run.recipe,
            seed=self._options.seed,
            repeats=self._options.repeats,
            started=self._session.started,
            finished=now(),
            status=status,
        )
        tell = self._session.progress
        report = self._among_stored(session, report)
        if path is not None:
            try:
                write(path, report)
            except (OSError, TargetError) as error:
                tell(f"lmcompose: the report {path} could not be written: {error}")
                session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        baseline = self._session.baseline
        compared = None if baseline is None else baseline.report
        if not write_reports(self._options.outputs, report, compared, tell):
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        if self._options.outputs.github and self._collected.records:
            self._add_to_job_summary(report, compared)
        self._session.report = report

    def _add_to_job_summary(self, report: Report, baseline: Report | None) -> None:
        """Append the Markdown report to the job summary, unless --lmcompose-markdown did."""
        from pytest_lmcompose.report import markdown

        mine = self._options.outputs.markdown
        if mine is not None and str(mine) == os.environ.get("GITHUB_STEP_SUMMARY"):
            return
        if (problem := github.add_summary(markdown.render(report, baseline))) is not None:
            self._session.progress(problem)

    def _update_cards(self, session: pytest.Session) -> None:
        """Write the final verdicts of gates into the cards of exported folders."""
        from pytest_lmcompose.checkpoints.card import update_card
        from pytest_lmcompose.errors import CheckpointError

        for record in self._collected.results:
            if record.export is not None:
                try:
                    update_card(record)
                except (OSError, CheckpointError) as error:
                    self._session.progress(f"lmcompose: the card of {record.export.folder} is out of date: {error}")
                    session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def _among_stored(self, session: pytest.Session, report: Report) -> Report:
        """Compare the run with the stored one and store it; return the report with the comparison."""
        if not self._collected.records:
            return report
        from pytest_lmcompose.baseline.history import keep, outcome

        baselines, baseline = self._options.baselines, self._session.run.baseline
        self._outcome = outcome(report, baseline, baselines, self._judged)
        try:
            ok = session.exitstatus == pytest.ExitCode.OK
            self._kept = keep(report, baselines, baseline, self._config.rootpath, ok=ok)
        except OSError as error:
            self._kept = f"lmcompose: the run could not be stored in {baselines.storage}: {error}"
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        return replace(self._outcome.added_to(report), unused_rules=tuple(self._unused()))

    def summarise(self, reporter: pytest.TerminalReporter) -> None:
        """Write the tables and the paths of the reports."""
        records = self._collected.results
        if records:
            write_summary(reporter, records, self._wanted, self._options.outputs.layout)
            write_paired(reporter, records, self._collected.late)
            write_closeness(reporter, records)
            write_composability(reporter, self._collected.composability, self._shown())
            self._write_compared(reporter)
            self._write_next(reporter)
        if left := self._left_out:
            names, count = first_names([c.id for c in left], _NAMED), counted(len(left), "composition")
            reporter.write_line(f"not run, because the time was used up: {count}: {names}", yellow=True)
        if self._stopped and self._session.begun:
            reporter.write_line(how_to_resume(self._session), yellow=True)
        for path in (self._options.json, *self._options.outputs.files.values()):
            if path is not None and path.is_file():
                reporter.write_line(f"lmcompose report: {path}")
        for record in records:
            if record.export is not None:
                reporter.write_line(f"lmcompose export: {record.export.folder}")
        if self._options.outputs.github and records:
            self._annotate(reporter)

    def _annotate(self, reporter: pytest.TerminalReporter) -> None:
        """Write an annotation for each failure and each drift, at the thresholds or the ini file."""
        from pytest_lmcompose.report.view import summarise_gates

        failures = summarise_gates(self._collected.results).failure_messages
        found = [(f"lmcompose: {name}", message) for name, message in failures]
        found += [("lmcompose", line) for line in self._idle]
        drifting = [
            (
                f"lmcompose: {row.composition}",
                f"{row.metric} got worse over {len(row.values)} stored runs, by {row.loss:.4g}",
            )
            for row in (() if self._outcome is None else self._outcome.drift)
            if row.drifts
        ]
        file = self._options.thresholds or self._config.inipath
        reporter.ensure_newline()
        for line in (*github.annotation_lines(found, file), *github.annotation_lines(drifting, file, kind="warning")):
            reporter.write_line(line)

    @property
    def _left_out(self) -> tuple[Composition, ...]:
        """The compositions that did not fit into the time."""
        return () if self._session.budget is None else self._session.budget.left_out

    def _plan(self) -> Plan | None:
        """Return the plan of the whole run; None if collection did not finish."""
        from pytest_lmcompose.report.planned import plan_section

        run, planned = self._session.run, self._session.planned
        return None if planned is None else plan_section(planned, run.rules, run.recipe, run.baseline)

    def _idle_expressions(self) -> list[str]:
        """Return errors for --lmcompose-compare-fail expressions that no gate used, except those for other shards."""
        from pytest_lmcompose.report.planned import idle

        run, options = self._session.run, self._options
        if not options.baselines.fail:
            return []
        # Without workers, expressions that match nothing are already errors before the tests.
        if found := [*session_checks.unmatched(self._session), *session_checks.dropped(self._session)]:
            return found
        here = self._collected.records
        off = self._session.gate_evaluator.off
        rules = [rule for rule in run.rules if options.shard is None or any(rule.covers(name) for name in here)]
        rules = [rule for rule in rules if off(rule.metric) is None]
        return [
            f"--lmcompose-compare-fail={source!r}: this judged nothing"
            for source in idle(rules, self._collected.results)
        ]

    def _write_next(self, reporter: pytest.TerminalReporter) -> None:
        """Write advice for failed gates."""
        records = self._collected.results
        failed = [
            (metric, record.by_metric.get(metric))
            for record in records
            for gate in record.gates
            if not gate.passed
            for metric in gate.metrics
        ]
        for line in advice((metric, None if found is None else found.higher_is_better) for metric, found in failed):
            reporter.write_line(f"next: {line}", yellow=True)

    def _prompts(self) -> tuple[Prompts, ...]:
        """Return the prompts of the samples; none if the data are unreadable, which the tests have reported."""
        from pytest_lmcompose.data.records import WorldError

        if not self._collected.records:
            return ()
        try:
            data = dict(zip(self._session.run.seeds, self._session.run.data, strict=True))
        except (WorldError, OSError):
            return ()
        recipe = self._session.run.recipe
        records = self._collected.results
        return prompts(
            data, records, recipe.world.pools, recipe.evaluate.question_limit, sequential=recipe.evaluate.sequential
        )

    def _write_compared(self, reporter: pytest.TerminalReporter) -> None:
        from pytest_lmcompose.report.compared import write_outcome, write_unused

        records = self._collected.results
        if self._outcome is not None:
            write_outcome(reporter, self._outcome, records, every=self._config.option.verbose > 0)
        write_unused(reporter, self._unused())
        for line in self._idle:
            reporter.write_line(f"failed: {line}", red=True)
        if self._kept is not None:
            reporter.write_line(self._kept)

    def _judged(self, composition: str, metric: str) -> bool:
        """Return whether a gate applies to a metric of a composition."""
        return any(rule.covers(composition) and rule.judges(metric) and rule.bounds for rule in self._session.run.rules)

    def _unused(self) -> list[Unused]:
        """Return the rules that no gate used."""
        from pytest_lmcompose.gate.thresholds import unused

        found = self._collected.records.values()
        measured = {r.id: [m.metric for m in r.measurements] for r in found if r.status == "measured"}
        return unused(self._session.run.rules, measured, self._session.gate_evaluator.off) if measured else []

    def _shown(self) -> list[str]:
        """Return the metrics of the terminal's tables."""
        records = self._collected.results
        return chosen_metrics(records, self._wanted, self._options.outputs.layout.columns)

    def _wanted(self, metric: str) -> bool:
        """Return whether to show a metric: those with a threshold, or all with -v or without thresholds."""
        rules = self._session.run.rules
        return self._config.option.verbose > 0 or not rules or any(rule.judges(metric) for rule in rules)
