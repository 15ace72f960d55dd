"""Terminal output on the baseline: changes, drift over stored runs, and unused rules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import pytest

from pytest_lmcompose.baseline.compare import ComparedReports
from pytest_lmcompose.baseline.drift import LEVEL
from pytest_lmcompose.baseline.history import Outcome
from pytest_lmcompose.gate.thresholds import Unused
from pytest_lmcompose.report.numbers import MISSING, number
from pytest_lmcompose.report.terminal import Cell, blocks, write_blocks
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import CompositionResult, Difference, Row

QUIET = ("equal", "same")
_HEAD = ("composition  metric", "old", "new", "change", "p (Holm)", "verdict")
_VERSIONS = 6
"""Maximum number of changed package versions shown without -v."""


def is_bad(row: Row) -> bool:
    """Return whether a row needs attention: it got worse, is gone, or cannot be compared."""
    if row.verdict == "changed":
        return row.difference is None or (row.difference > 0) != row.higher_is_better
    return row.verdict in ("worse", "gone", "unknown")


def difference_text(difference: Difference) -> str:
    """Return a difference between two runs as one line."""
    verb = "differs" if difference.what in ("model", "seed") else "differ"
    return visible(f"{difference.what} {verb}: {difference.message}")


def comparison_rows(rows: Iterable[Row], failed: Collection[tuple[str, str]] = ()) -> list[list[Cell]]:
    """Return a table with a header and one row per metric and composition; `failed` ones are marked."""
    table = [[Cell(name) for name in _HEAD]]
    for row in rows:
        change = MISSING if row.difference is None else f"{row.difference:+.3g}"
        cells = [
            *(MISSING if value is None else number(value) for value in (row.old, row.new)),
            change + ("" if row.stderr is None else f" ±{row.stderr:.2g}"),
            MISSING if row.p_holm is None else f"{row.p_holm:.2g}",
            row.verdict + (f": {row.note}" if row.note else ""),
        ]
        bad = is_bad(row) or (row.composition, row.metric) in failed
        table.append([Cell(f"{row.composition}  {row.metric}", bad), *map(Cell, cells)])
    return table


def write_rows(
    reporter: pytest.TerminalReporter, rows: Iterable[Row], failed: Collection[tuple[str, str]] = ()
) -> None:
    """Write `comparison_rows` as a table."""
    columns = [list(column) for column in zip(*comparison_rows(rows, failed), strict=True)]
    write_blocks(reporter, blocks(columns, reporter._tw.fullwidth))


def write_outcome(
    reporter: pytest.TerminalReporter,
    found: Outcome,
    records: Iterable[CompositionResult],
    *,
    every: bool,
) -> None:
    """Write changes since the baseline, then drift; with `every`, unchanged metrics too."""
    if found.baseline is not None and found.compared is not None:
        reporter.write_line(f"changes since {found.baseline.name} (paired samples, two-sided p)", bold=True)
        name = found.baseline.name
        gates = ((r.id, g) for r in records for g in r.gates if g.reference == name and not g.passed)
        failed = {(composition, metric) for composition, gate in gates for metric in gate.metrics}
        _write_comparison(reporter, found.compared, failed, every=every)
    for row in found.drift:
        if row.drifts:
            values = " ".join(map(number, row.values))
            name = visible(f"{row.composition}  {row.metric}")
            reporter.write_line(
                f"drift over {len(row.values)} runs: {name} {values}: {row.loss:.4g} worse "
                f"(Mann-Kendall p = {row.p:.2g}, after Holm {row.p_holm:.2g}; alarm at {LEVEL:g})",
                yellow=True,
            )
    for problem in found.problems:
        reporter.write_line(visible(problem), yellow=True)


def write_unused(reporter: pytest.TerminalReporter, found: Sequence[Unused]) -> None:
    """Write the unused rules; compositions that were not measured share one line."""
    for rule in found:
        if rule.tested:
            reporter.write_line(f"unused rule: {rule}", yellow=True)
    untested = dict.fromkeys(repr(rule.composition) for rule in found if not rule.tested)
    if untested:
        reporter.write_line(f"rules for compositions that were not measured: {', '.join(untested)}")


def _write_comparison(
    reporter: pytest.TerminalReporter,
    found: ComparedReports,
    failed: Collection[tuple[str, str]],
    *,
    every: bool,
) -> None:
    versions = [d for d in found.differences if d.what == "versions"]
    shown = [d for d in found.differences if d.what != "versions"] + versions[: None if every else _VERSIONS]
    for difference in shown:
        reporter.write_line(difference_text(difference), yellow=True)
    if len(versions) > _VERSIONS and not every:
        reporter.write_line(f"and {len(versions) - _VERSIONS} more versions", yellow=True)
    if found.problem is not None:
        reporter.write_line(visible(f"not compared: {found.problem}"), red=True)
        return
    both = [row for row in found.rows if row.composition not in _alone(found.rows)]
    rows = [row for row in both if every or row.verdict not in QUIET or (row.composition, row.metric) in failed]
    if rows:
        write_rows(reporter, rows, failed)
    equal, same = (sum(row.verdict == verdict for row in both) for verdict in QUIET)
    reporter.write_line(
        f"{len(both)} metrics compared: {equal} identical, {same} within noise" + ("" if every else "; -v shows them")
    )
    for composition, verdict in _alone(found.rows).items():
        reporter.write_line(f"{visible(composition)}: only in {'this run' if verdict == 'new' else 'the baseline'}")


def _alone(rows: Iterable[Row]) -> dict[str, str]:
    """Return the compositions in one run only, with their verdict: new or gone."""
    verdicts: dict[str, set[str]] = {}
    for row in rows:
        verdicts.setdefault(row.composition, set()).add(row.verdict)
    return {name: found.pop() for name, found in verdicts.items() if found in ({"new"}, {"gone"})}
