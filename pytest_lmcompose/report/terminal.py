"""The summary table, composition by metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from pytest_lmcompose.report.layout import arranged, chosen_metrics, unmatched
from pytest_lmcompose.report.layout import shown_metrics as shown_metrics
from pytest_lmcompose.report.numbers import value_text
from pytest_lmcompose.report.options import Layout
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import CompositionResult

DEFAULT = Layout()
FAILED = "!"
GAP = 2


@dataclass(frozen=True)
class Cell:
    """A value as shown; a failed one is marked."""

    text: str
    failed: bool = False


def table(
    records: Sequence[CompositionResult], width: int, wanted: Callable[[str], bool], layout: Layout = DEFAULT
) -> list[list[list[Cell]]]:
    """Return blocks of rows, each block as many metrics as fit into `width` characters.

    The first row of a block is its head, the first cell of a row its composition. Shown are the
    metrics that a gate judged, and those that are `wanted`, or those that `layout` names; a group of
    rows has its name in a row of its own.
    """
    columns = [[Cell("composition")], *([Cell(name)] for name in chosen_metrics(records, wanted, layout.columns))]
    for name, group in arranged(records, layout):
        if name is not None:
            columns[0].append(Cell(f"{name}:"))
            for column in columns[1:]:
                column.append(Cell(""))
        for record in group:
            columns[0].append(Cell(("  " if name is not None else "") + record.id, bool(record.error)))
            for column in columns[1:]:
                column.append(_cell(record, column[0].text))
    return blocks(columns, width)


def blocks(columns: Sequence[list[Cell]], width: int) -> list[list[list[Cell]]]:
    """Return blocks of rows, each with the first column and as many others as fit into `width`."""
    columns = [[Cell(visible(cell.text), cell.failed) for cell in column] for column in columns]
    first = columns[0]
    found: list[list[list[Cell]]] = [[first]]
    used = _width(first)
    for column in columns[1:]:
        if used + GAP + _width(column) > width and len(found[-1]) > 1:
            found.append([first])
            used = _width(first)
        found[-1].append(column)
        used += GAP + _width(column)
    return [[list(row) for row in zip(*block, strict=True)] for block in found]


def write_blocks(reporter: pytest.TerminalReporter, found: Sequence[Sequence[Sequence[Cell]]]) -> None:
    """Write blocks of rows, the head bold and what failed red; an empty line after each."""
    for block in found:
        widths = [_width(column) for column in zip(*block, strict=True)]
        for line, row in enumerate(block):
            padded = list(map(_padded, row, widths, range(len(row))))
            if any(cell.failed for cell in row):
                for text, cell in zip(padded, row, strict=True):
                    reporter.write(text, red=cell.failed, bold=line == 0)
            else:  # at once, since there may be thousands
                reporter.write("".join(padded), bold=line == 0)
            reporter.write("\n")
        reporter.write("\n")


def _padded(cell: Cell, width: int, column: int) -> str:
    text = cell.text + (FAILED if cell.failed else "")
    return text.ljust(width) if column == 0 else " " * GAP + text.rjust(width)


def write_summary(
    reporter: pytest.TerminalReporter,
    records: Sequence[CompositionResult],
    wanted: Callable[[str], bool],
    layout: Layout = DEFAULT,
) -> None:
    """Write the table of a run under a heading of its own."""
    reporter.section("lmcompose", sep="=")
    for line in unmatched(records, layout):
        reporter.write_line(line, yellow=True)
    write_blocks(reporter, table(records, reporter._tw.fullwidth, wanted, layout))
    for record in records:
        if record.error:
            reporter.write_line(visible(f"{record.id}: {record.error}"), red=True)
    for gate in (gate for record in records for gate in record.gates if gate.state == "lost"):
        reporter.write_line(f"known loss: {visible(gate.message)}", yellow=True)
    if any(not gate.passed for record in records for gate in record.gates):
        reporter.write_line(f"{FAILED} a gate failed")


def _cell(record: CompositionResult, metric: str) -> Cell:
    return Cell(value_text(record.by_metric.get(metric)), metric in record.failed_metrics)


def _width(column: Sequence[Cell]) -> int:
    # One character is kept for the mark, so that a failure does not move the columns.
    return max(len(cell.text) for cell in column) + len(FAILED)
