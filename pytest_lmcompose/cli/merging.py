"""`lmcompose merge`: join the reports of shards, or of runs of different compositions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pytest_lmcompose.cli.problems import FAILED, CommandError
from pytest_lmcompose.report.text import visible

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=_FILE)
@click.option("--output", "-o", required=True, type=_FILE, help="Write the report to this file.")
@click.option(
    "--partial",
    is_flag=True,
    help="Merge even if shards are missing or interrupted; the result is an interrupted run.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=1e-5,
    show_default=True,
    help="Largest relative difference between two measurements of the same number.",
)
def merge(runs: Sequence[Path], output: Path, partial: bool, tolerance: float) -> None:
    """Join reports RUNS into one: all shards of a run, or runs of different compositions.

    The reports must have the same model, seeds, settings, thresholds, data and versions. Shards must also have
    selected the same compositions, and together test all of them. Paired gates and composability are recomputed from
    all reports. The exit code is 1 if a gate or composition failed; it is 2, with one line per problem, if reports do
    not match, or one is missing or interrupted.
    """
    from pytest_lmcompose.baseline.storage import StorageError, passed, read_run
    from pytest_lmcompose.merge import MergeError
    from pytest_lmcompose.merge import merge as joined
    from pytest_lmcompose.report.collect import write
    from pytest_lmcompose.report.files import TargetError, check_targets

    try:
        check_targets({"--output": output}, {f"the report {path}": path for path in runs})
        found = joined({str(path): read_run(path) for path in runs}, partial=partial, tolerance=tolerance)
        write(output, found.report)
    except (MergeError, StorageError, TargetError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{output} cannot be written: {error.strerror}") from None
    records = found.report.compositions
    for message in found.late:
        click.echo(visible(f"failed when all paired gates were judged together: {message}"))
    for expression in found.idle:
        click.echo(f"failed: --lmcompose-compare-fail={expression!r} judged nothing")
    failed = sum(1 for record in records for gate in record.gates if not gate.passed)
    click.echo(
        f"{output}: {len(records)} compositions of {len(runs)} reports, {found.report.status}, "
        f"{failed} gate{'s' * (failed != 1)} failed"
    )
    if not records or found.idle or not passed(found.report):
        raise SystemExit(FAILED)
