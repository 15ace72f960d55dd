"""`lmcompose show`, `compare` and `report`: inspect stored runs.

A run is the path of a report, or a name or number in the folder of stored runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
import msgspec
import pytest

from pytest_lmcompose.baseline.storage import FOLDER, Storage, StorageError, read_run
from pytest_lmcompose.cli.console import Console
from pytest_lmcompose.cli.problems import FAILED, CommandError
from pytest_lmcompose.report.options import BY_ID, GROUPS, Layout
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import CompositionResult, Report, Row, replace

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.compare import ComparedReports

_SAMPLES = 3
"""Number of changed samples to show for each metric of a composition."""

STORAGE = click.option(
    "--storage",
    type=click.Path(file_okay=False, path_type=Path),
    default=FOLDER,
    show_default=True,
    help="Folder of stored runs, as in pytest's --lmcompose-storage.",
)
_METRICS = click.option(
    "--metric", "-m", "metrics", multiple=True, metavar="GLOB", help="Show only these.  [repeatable]"
)


@click.command()
@click.argument("run")
@_METRICS
@click.option("--all", "-a", "every", is_flag=True, help="Show every metric, not only those with a gate.")
@click.option("--sort", metavar="METRIC", help="Sort by a metric, best first, or by id; -METRIC: worst first.")
@click.option("--group", type=click.Choice(GROUPS), help="Group by the steps' categories, or by the first step.")
@STORAGE
def show(run: str, metrics: Sequence[str], every: bool, sort: str | None, group: str | None, storage: Path) -> None:
    """Show the tables that pytest prints at the end of RUN."""
    from pytest_lmcompose.report.layout import shown_metrics, sorted_records
    from pytest_lmcompose.report.sections import write_closeness, write_composability, write_paired
    from pytest_lmcompose.report.terminal import write_summary

    path, document = load(run, storage)
    _head(path, document)
    if sort is not None and sort.removeprefix("-") != BY_ID:
        _known(sort.removeprefix("-"), document)
    records = sorted_records(document.compositions, sort)  # before metrics are removed, which may include the sort key
    judged = any(record.gates for record in records)
    if metrics:
        records = [_only(record, known_metrics(metrics, document)) for record in records]

    def wanted(metric: str) -> bool:
        return bool(metrics) or every or not judged

    console = cast(pytest.TerminalReporter, Console())
    write_summary(console, records, wanted, Layout(tuple(metrics), None, group))
    write_paired(console, records, [])
    write_closeness(console, records)
    write_composability(console, document.composability, shown_metrics(records, wanted))


@click.command()
@click.argument("old")
@click.argument("new", nargs=-1, required=True)
@_METRICS
@click.option("--all", "-a", "every", is_flag=True, help="Show every row, not only changes beyond noise.")
@click.option("--fail", is_flag=True, help="Exit with code 1 if a metric is worse, missing, or cannot be compared.")
@click.option("--json", "as_json", is_flag=True, help="Print all rows as JSON.")
@STORAGE
def compare(
    old: str, new: Sequence[str], metrics: Sequence[str], every: bool, fail: bool, as_json: bool, storage: Path
) -> None:
    """Compare run NEW with run OLD, metric by metric; several NEW become columns.

    Differences are paired by sample if both runs used the same samples. p is two-sided, with Holm's correction over all
    rows and columns; a metric is worse or better at 0.05.
    """
    import dataclasses

    from pytest_lmcompose.baseline.compare import compare_several
    from pytest_lmcompose.report.compared import is_bad

    old_path, before = load(old, storage)
    paths, reports = zip(*(load(name, storage) for name in new), strict=True)
    if metrics:
        known_metrics(metrics, before, *reports)
    found = [
        dataclasses.replace(part, rows=tuple(row for row in part.rows if matches(row.metric, metrics)))
        for part in compare_several(before, reports)
    ]
    if as_json:
        document = found[0] if len(found) == 1 else dict(zip(map(str, paths), found, strict=True))
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=1).decode())
    elif len(found) == 1:
        _write_comparison(old_path, paths[0], found[0], found[0].rows, every)
        for line in _answers(before, reports[0], found[0].rows):
            click.echo(line)
    else:
        _write_columns((old_path, *paths), found, every)
    for path, part in zip(paths, found, strict=True):
        if part.problem is not None:
            raise CommandError(f"{old_path} and {path} cannot be compared: {part.problem}")
    if fail and any(is_bad(row) for part in found for row in part.rows):
        raise click.exceptions.Exit(FAILED)


def _write_columns(paths: Sequence[Path], found: Sequence[ComparedReports], every: bool) -> None:
    """Write a table of several comparisons with one run: a row for each metric, a column for each run."""
    from pytest_lmcompose.report.compared import QUIET, difference_text, is_bad
    from pytest_lmcompose.report.numbers import MISSING, number
    from pytest_lmcompose.report.terminal import Cell, blocks, write_blocks

    for path, part in zip(paths[1:], found, strict=True):
        for difference in part.differences:
            click.echo(f"{visible(path.stem)}: {difference_text(difference)}")
    by_run = [{(row.composition, row.metric): row for row in part.rows} for part in found]
    keys = [
        key
        for key in dict.fromkeys(key for rows in by_run for key in rows)
        if every or any(key in rows and rows[key].verdict not in QUIET for rows in by_run)
    ]
    columns = [[Cell("composition  metric"), *(Cell("  ".join(key)) for key in keys)], [Cell(paths[0].stem)]]
    for key in keys:
        old = next((rows[key].old for rows in by_run if key in rows and rows[key].old is not None), None)
        columns[1].append(Cell(MISSING if old is None else number(old)))
    for path, rows in zip(paths[1:], by_run, strict=True):
        column = [Cell(path.stem)]
        for key in keys:
            row = rows.get(key)
            texts = [MISSING if row is None or row.new is None else number(row.new)]
            if row is not None and row.difference:
                texts.append(f"({row.difference:+.3g}" + ("" if row.p_holm is None else f", p {row.p_holm:.2g}") + ")")
            column.append(Cell(" ".join(texts), row is not None and is_bad(row)))
        columns.append(column)
    console = Console()
    if keys:
        click.echo()
        write_blocks(cast(pytest.TerminalReporter, console), blocks(columns, console._tw.fullwidth))
    for path, part in zip(paths[1:], found, strict=True):
        click.echo(f"{visible(path.stem)}: {_counts(part.rows)}")


def _counts(rows: Iterable[Row]) -> str:
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare"


def _answers(before: Report, after: Report, rows: Iterable[Row]) -> Iterator[str]:
    """Yield old and new answers for some changed samples of each metric that changed."""
    from pytest_lmcompose.report.view import changed_samples

    old, new = before.by_id, after.by_id
    for row in rows:
        if row.verdict not in ("better", "worse") or row.composition not in old or row.composition not in new:
            continue
        one, other = old[row.composition], new[row.composition]
        for found in changed_samples(one, other, [row.metric], after, _SAMPLES):
            if other.by_metric[row.metric].answers:
                yield visible(
                    f"{row.composition}  {row.metric}: {found.worse} worse, {found.better} better, for example"
                )
                yield from (visible(f"  {s.label}: {s.before} -> {s.after}") for s in found.shown)


@click.command()
@click.argument("run")
@click.option("--html", metavar="PATH", help="Write a self-contained page.")
@click.option("--markdown", metavar="PATH", help="Write a summary, for example for a CI service.")
@click.option("--latex", metavar="PATH", help="Write tables of order-free error and order sensitivity.")
@click.option("--baseline", metavar="RUN", help="Compare with this run in the page and the summary.")
@STORAGE
def report(
    run: str, html: str | None, markdown: str | None, latex: str | None, baseline: str | None, storage: Path
) -> None:
    """Write reports of RUN; use - as a path for standard output."""
    if html is None and markdown is None and latex is None:
        raise click.UsageError("name at least one report: --html, --markdown or --latex")
    path, document = load(run, storage)
    old, before = (None, None) if baseline is None else load(baseline, storage)
    _check_reports({"--html": html, "--markdown": markdown, "--latex": latex}, [path, *([] if old is None else [old])])
    if html is not None:
        from pytest_lmcompose.report import html as page

        _write(html, lambda: page.render(document, before))
    if markdown is not None:
        from pytest_lmcompose.report import markdown as summary

        _write(markdown, lambda: summary.render(document, before))
    if latex is not None:
        from pytest_lmcompose.report import latex as tables

        _write(latex, lambda: tables.render(document))


def load(run: str, storage: Path) -> tuple[Path, Report]:
    """Return the file of a run and its report; raises CommandError."""
    try:
        path = Storage(storage).find(run)
        return path, read_run(path)
    except StorageError as error:
        raise CommandError(str(error)) from None


def _head(path: Path, document: Report) -> None:
    model = document.model
    name = "no model was loaded" if model is None else f"{model.id}, weights {model.weight_hash[:12]}"
    click.echo(visible(f"{path}: {document.status} {document.finished}"))
    repeats = f", {document.repeats} repeats" if document.repeats > 1 else ""
    click.echo(visible(f"{name}; seed {document.seed}{repeats}"))


def known_metrics(globs: Sequence[str], *documents: Report) -> Sequence[str]:
    """Return `globs` if each matches a metric; raise CommandError with similar names otherwise."""
    known = _metrics(*documents)
    for glob in globs:
        if not any(fnmatchcase(metric, glob) for metric in known):
            _known(glob, *documents)
    return globs


def matches(name: str, globs: Sequence[str]) -> bool:
    """Return whether a name matches any of `globs`; without globs, all do."""
    return not globs or any(fnmatchcase(name, glob) for glob in globs)


def _known(metric: str, *documents: Report) -> None:
    """Check that a metric was measured; raise CommandError with similar names otherwise."""
    from interventions.names import near_names

    known = _metrics(*documents)
    if metric not in known:
        raise CommandError(f"no metric {metric!r} was measured.{near_names(metric, known)} Known: {', '.join(known)}.")


def _metrics(*documents: Report) -> list[str]:
    return list(dict.fromkeys(m.metric for d in documents for r in d.compositions for m in r.measurements))


def _only(record: CompositionResult, globs: Sequence[str]) -> CompositionResult:
    """Return a composition's record with only the metrics that match `globs`."""
    return replace(
        record,
        measurements=tuple(m for m in record.measurements if matches(m.metric, globs)),
        gates=tuple(gate for gate in record.gates if any(matches(metric, globs) for metric in gate.metrics)),
    )


def _write_comparison(old: Path, new: Path, found: ComparedReports, rows: Sequence[Row], every: bool) -> None:
    from pytest_lmcompose.report.compared import QUIET, difference_text, write_rows

    click.echo(f"old: {visible(str(old))}\nnew: {visible(str(new))}")
    for difference in found.differences:
        click.echo(f"  {difference_text(difference)}")
    shown = [row for row in rows if every or row.verdict not in QUIET]
    if shown:
        click.echo()
        write_rows(cast(pytest.TerminalReporter, Console()), shown)
    click.echo(_counts(rows))


def _check_reports(targets: Mapping[str, str | None], read: Sequence[Path]) -> None:
    """Check that all reports can be written to different files; raise CommandError otherwise."""
    from pytest_lmcompose.report.files import TargetError, check_targets

    files = {name: Path("/dev/stdout" if path == "-" else path) for name, path in targets.items() if path is not None}
    try:
        check_targets(files, {f"the run {path}": path for path in read})
    except TargetError as error:
        raise CommandError(str(error)) from None


def _write(target: str, render: Callable[[], str]) -> None:
    from pytest_lmcompose.report.files import stream_of, write_text

    text = render()
    if target == "-":
        click.echo(text, nl=not text.endswith("\n"))
        return
    path = Path(target)
    try:
        write_text(path, text)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from None
    if path.is_file():
        click.echo(f"{path}: {path.stat().st_size:,} bytes", err=stream_of(path) is not None)
