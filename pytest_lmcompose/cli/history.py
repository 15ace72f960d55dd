"""`lmcompose runs`: list the stored runs, and follow metrics over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec
import pytest

from pytest_lmcompose.baseline.storage import Storage, StorageError, Stored, passed, read_run
from pytest_lmcompose.cli.console import Console
from pytest_lmcompose.cli.problems import CommandError
from pytest_lmcompose.cli.runs import STORAGE, known_metrics, matches
from pytest_lmcompose.report.numbers import MISSING, with_error
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import DriftRow, Report

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.drift import Series

_BARS = "▁▂▃▄▅▆▇█"
_HEAD = ("run", "finished", "commit", "model", "world", "compositions", "gates", "seconds")
_SHORT = 8
"""Characters of a commit that the table shows."""


@click.command()
@click.option("--metric", "-m", "metrics", multiple=True, metavar="GLOB", help="Follow these metrics.  [repeatable]")
@click.option("--of", "-c", "compositions", multiple=True, metavar="GLOB", help="Of these compositions.  [repeatable]")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last N stored runs.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="PATH", help="Draw the metrics, as .svg or .html.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@STORAGE
def runs(
    metrics: Sequence[str],
    compositions: Sequence[str],
    last: int | None,
    plot: Path | None,
    as_json: bool,
    storage: Path,
) -> None:
    """List the stored runs; with --metric or --of, show how metrics changed over them.

    A metric drifts if it gets worse from run to run: one-sided Mann-Kendall test at level 0.01, with Holm's correction
    over all metrics shown. Runs of other models than the last one's, or on other data, are left out.
    """
    followed = bool(metrics or compositions)
    if plot is not None and not followed:
        raise click.UsageError("--plot draws metrics: name them with --metric or --of")
    if plot is not None and plot.suffix not in (".svg", ".html"):
        raise click.UsageError(f"--plot={plot}: expected a path that ends with .svg or .html")
    stored = Storage(storage).runs()[-(last or 0) :]
    if not stored:
        raise CommandError(f"no run is stored in {storage}; store one with pytest --lmcompose-save=NAME")
    found, broken = _read(stored)
    for problem in broken:
        click.echo(visible(f"left out: {problem}"), err=True)
    if not found:
        raise CommandError(f"no run in {storage} can be read")
    trends = _trends(found, metrics, compositions) if followed else []
    if plot is not None:
        _draw(plot, [run for run, _ in found], [series for series, _ in trends])
    if as_json:
        rows = [_facts(run, report) for run, report in found]
        document = {"runs": rows, **({"trends": [_trend(found, *trend) for trend in trends]} if followed else {})}
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=1).decode())
    elif followed:
        _write_trends(found, trends)
    else:
        _table([_HEAD, *(tuple(_cells(_facts(run, report))) for run, report in found)])


Runs = Sequence[tuple[Stored, Report]]
Trend = tuple["Series", "DriftRow | None"]


def _read(stored: Sequence[Stored]) -> tuple[list[tuple[Stored, Report]], list[str]]:
    """Return the runs that can be read, and what is wrong with the others."""
    found, broken = [], []
    for run in stored:
        try:
            found.append((run, read_run(run.path)))
        except StorageError as error:
            broken.append(str(error))
    return found, broken


def _facts(run: Stored, report: Report) -> dict[str, Any]:
    """Return what the list says of a run."""
    gates = Counter(gate.state for record in report.compositions for gate in record.gates)
    begun, ended = map(datetime.fromisoformat, (report.started, report.finished))
    world = report.recipe.world
    sources = (world.get(key) for key in ("folder", "edits", "facts"))
    return {
        "run": str(run),
        "started": report.started,
        "finished": report.finished,
        "commit": None if report.stored is None else report.stored.commit,
        "dirty": report.stored is not None and report.stored.dirty,
        "model": None if report.model is None else report.model.id,
        "world": next((Path(text).name for text in sources if isinstance(text, str) and text), None),
        "compositions": len(report.compositions),
        "gates": {state: gates[state] for state in ("passed", "failed", "lost")},
        "passed": passed(report),
        "seconds": (ended - begun).total_seconds(),
    }


def _cells(facts: dict[str, Any]) -> Iterator[str]:
    yield facts["run"]
    yield facts["finished"][:16].replace("T", " ")
    yield MISSING if facts["commit"] is None else facts["commit"][:_SHORT] + "*" * facts["dirty"]
    yield facts["model"] or MISSING
    yield facts["world"] or MISSING
    yield str(facts["compositions"])
    counts = ", ".join(f"{count} {state}" for state, count in facts["gates"].items() if count) or "none"
    yield counts if facts["passed"] or facts["gates"]["failed"] else f"{counts}, tests failed"
    yield f"{facts['seconds']:.0f}"


def _trends(found: Runs, metrics: Sequence[str], compositions: Sequence[str]) -> list[Trend]:
    """Return the chosen metrics over the runs, with their tests; raises CommandError for globs that match nothing."""
    from pytest_lmcompose.baseline.drift import drifts, series

    reports = [report for _, report in found]
    known_metrics(metrics, *reports)
    names = [record.id for record in reports[-1].compositions]
    for glob in compositions:
        if not any(fnmatchcase(name, glob) for name in names):
            raise CommandError(
                f"--of={glob}: the last run, {found[-1][0]}, has no such composition: {', '.join(names)}"
            )

    def wanted(composition: str, metric: str) -> bool:
        return matches(composition, compositions) and matches(metric, metrics)

    chosen = list(series(reports, wanted))
    if not chosen:
        raise CommandError(f"the last run, {found[-1][0]}, has no finite value of these metrics")
    tests = {(row.composition, row.metric): row for row in drifts(reports, judged=wanted, window=len(reports))}
    return [(entry, tests.get((entry.composition, entry.metric))) for entry in chosen]


def _write_trends(found: Runs, trends: Sequence[Trend]) -> None:
    """Write the values by run, then each metric as a line of bars with its test."""
    columns = [["run", *(str(run) for run, _ in found)]]
    for entry, _ in trends:
        values = dict(entry.points)
        cells = [values.get(place) for place in range(len(found))]
        texts = [MISSING if cell is None else with_error(cell.value, cell.stderr) for cell in cells]
        columns.append([f"{entry.composition} {entry.metric}", *texts])
    _table(list(zip(*columns, strict=True)))
    rows = [("composition  metric", "over the runs", "change", "p of getting worse (Holm)")]
    for entry, test in trends:
        change = entry.points[-1][1].number - entry.points[0][1].number
        p = "too few runs" if test is None else f"{test.p_holm:.2g}" + (" drifts" if test.drifts else "")
        heights = {place: measured.number for place, measured in entry.points}
        bars = sparkline([heights.get(place) for place in range(len(found))])
        rows.append((f"{entry.composition}  {entry.metric}", bars, f"{change:+.3g}", p))
    _table(rows, {f"{entry.composition}  {entry.metric}" for entry, test in trends if test and test.drifts})


def sparkline(values: Sequence[float | None]) -> str:
    """Return values as bars from their smallest to their largest; a missing one is a space."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    steps = len(_BARS) - 1
    return "".join(
        " " if value is None else _BARS[round((value - low) / (high - low) * steps) if high > low else steps // 2]
        for value in values
    )


def _trend(found: Runs, entry: Series, test: DriftRow | None) -> dict[str, Any]:
    points = [
        {"run": str(found[place][0]), "value": measured.value, "stderr": measured.stderr, "n": measured.n}
        for place, measured in entry.points
    ]
    drift = None if test is None else {"p": test.p, "p_holm": test.p_holm, "drifts": test.drifts, "loss": test.loss}
    return {
        "composition": entry.composition,
        "metric": entry.metric,
        "higher_is_better": entry.higher_is_better,
        "points": points,
        "mann_kendall": drift,
    }


def _draw(path: Path, stored: Sequence[Stored], found: Sequence[Series]) -> None:
    """Write the plot; raises CommandError."""
    from pytest_lmcompose.report.figures import VEGA_LITE, trend
    from pytest_lmcompose.report.html import missing_figures

    if missing_figures() is not None:
        raise CommandError("--plot: install the extra html: pip install 'pytest-lmcompose[html]'")
    import vl_convert

    spec = trend([run.number for run in stored], found)
    try:
        if path.suffix == ".svg":
            text = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
        else:
            text = vl_convert.vegalite_to_html(spec, vl_version=VEGA_LITE, bundle=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from None


def _table(rows: Sequence[Sequence[str]], failed: Collection[str] = ()) -> None:
    from pytest_lmcompose.report.terminal import Cell, blocks, write_blocks

    console = Console()
    columns = [[Cell(text, text in failed) for text in column] for column in zip(*rows, strict=True)]
    write_blocks(cast(pytest.TerminalReporter, console), blocks(columns, console._tw.fullwidth))
