"""`lmcompose gate OLD NEW`: evaluation logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
import pytest

from pytest_lmcompose.cli.console import Console
from pytest_lmcompose.cli.problems import FAILED, CommandError
from pytest_lmcompose.imports import no_collection
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.texts import counted, first_names

if TYPE_CHECKING:
    from pytest_lmcompose.results import Gate, Row

DEFAULT = ("*:p0.05",)
"""What fails a log: a metric that a paired test finds worse."""
_SHOWN = 10
"""Names that only the earlier log has."""


@no_collection()
def judge_two_logs(
    old: Path, new: Path, expressions: Sequence[str], *, common: bool, any_prompt: bool, every: bool, github: bool
) -> None:
    """Print how the log `new` compares with `old`, and exit with code 1 if a gate failed; raises CommandError."""
    from pytest_lmcompose.baseline.reference import Baseline
    from pytest_lmcompose.baseline.storage import StorageError, read_run
    from pytest_lmcompose.gate.thresholds import ThresholdError, read_expression
    from pytest_lmcompose.logs.judge import judge_logs, judge_reports
    from pytest_lmcompose.logs.log import LogError
    from pytest_lmcompose.logs.read import is_report, read_log
    from pytest_lmcompose.report.compared import QUIET, write_rows

    try:
        rules = [read_expression(text) for text in expressions or DEFAULT]
        if is_report(old) and is_report(new):
            if not expressions:
                raise click.UsageError("name what fails a report, such as --fail recall:p0.01")
            found = judge_reports(Baseline(old, read_run(old)), read_run(new), rules)
        else:
            found = judge_logs(read_log(old), read_log(new), rules, common=common, any_prompt=any_prompt)
    except (LogError, StorageError, ThresholdError) as error:
        raise CommandError(str(error)) from None
    failed = [gate for gate in found.gates if not gate.passed]
    names = {metric for gate in failed for metric in gate.metrics}
    rows = [row for row in found.rows if every or row.verdict not in QUIET or row.metric in names]
    if rows:
        marked = {(row.composition, row.metric) for row in rows if row.metric in names}
        write_rows(cast(pytest.TerminalReporter, Console()), rows, marked)
    for gate in failed:
        click.echo(visible(f"failed: {gate.message}"))
    if github:
        tell_github(f"{new} compared with {old}", found.gates, new, rows)
    if found.gone:
        click.echo(visible(f"only in {old}: {first_names(found.gone, _SHOWN)}"))
    if found.left_out:
        click.echo(f"left out: {found.left_out} samples that only one log has")
    click.echo(visible(f"{new}: {len(failed)} of {counted(len(found.gates), 'gate')} failed"))
    if failed:
        raise click.exceptions.Exit(FAILED)


def tell_github(title: str, gates: Sequence[Gate], file: Path, rows: Sequence[Row] = ()) -> None:
    """In GitHub Actions, annotate the gates that failed at `file`, and add to the job summary."""
    from pytest_lmcompose.report import github, markdown

    if not github.active():
        return
    failures = [(f"lmcompose: {gate.metric}", gate.message) for gate in gates if not gate.passed]
    for line in github.annotation_lines(failures, file):
        click.echo(line)
    if (problem := github.add_summary(markdown.render_gates(title, gates, rows))) is not None:
        click.echo(problem, err=True)
