"""The summary table, composition by metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from pytest_lmcompose.report.layout import arranged, chosen_metrics, unmatched
from pytest_lmcompose.report.layout import shown_metrics as shown_metrics
from pytest_lmcompose.report.numbers import value_text
from pytest_lmcompose.report.options import Layout
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import CompositionResult

DEFAULT = Layout()
MARKS = {"failed": "!", "lost": "~", "": ""}
GAP = 2


@dataclass(frozen=True)
class Cell:
    """A value as shown, with a mark if its gate failed or it is a known loss."""

    text: str
    failed: bool = False
    lost: bool = False

    @property
    def state(self) -> str:
        """Key of the mark."""
        return "failed" if self.failed else "lost" if self.lost else ""


def table(
    records: Sequence[CompositionResult], width: int, wanted: Callable[[str], bool], layout: Layout = DEFAULT
) -> list[list[list[Cell]]]:
    """Return the table as blocks of rows; a block has as many metrics as fit into `width` characters.

    The first row of a block is its header, the first cell of a row the composition. Metrics are shown
    if a gate judged them or they are `wanted`, or if `layout` names them. Each group starts with a row
    for its name.
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
    """Split columns into blocks of rows: the first column, and as many others as fit into `width`."""
    columns = [[replace(cell, text=visible(cell.text)) for cell in column] for column in columns]
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
    """Write blocks of rows, each followed by an empty line; headers are bold, failures red, known losses yellow."""
    for block in found:
        widths = [_width(column) for column in zip(*block, strict=True)]
        for line, row in enumerate(block):
            padded = list(map(_padded, row, widths, range(len(row))))
            if any(cell.state for cell in row):
                for text, cell in zip(padded, row, strict=True):
                    reporter.write(text, red=cell.failed, yellow=cell.state == "lost", bold=line == 0)
            else:  # one call: there may be thousands of rows
                reporter.write("".join(padded), bold=line == 0)
            reporter.write("\n")
        reporter.write("\n")


def _padded(cell: Cell, width: int, column: int) -> str:
    text = cell.text + MARKS[cell.state]
    return text.ljust(width) if column == 0 else " " * GAP + text.rjust(width)


def write_summary(
    reporter: pytest.TerminalReporter,
    records: Sequence[CompositionResult],
    wanted: Callable[[str], bool],
    layout: Layout = DEFAULT,
) -> None:
    """Write the summary table of a run with its heading, errors and known losses."""
    reporter.section("lmcompose", sep="=")
    for line in unmatched(records, layout):
        reporter.write_line(line, yellow=True)
    write_blocks(reporter, table(records, reporter._tw.fullwidth, wanted, layout))
    for record in records:
        if record.error:
            reporter.write_line(visible(f"{record.id}: {record.error}"), red=True)
    gates = [gate for record in records for gate in record.gates]
    for gate in gates:
        if gate.state == "lost":
            reporter.write_line(f"known loss: {visible(gate.message)}", yellow=True)
    for state, text in (("failed", "a gate failed"), ("lost", "a known loss")):
        if any(gate.state == state for gate in gates):
            reporter.write_line(f"{MARKS[state]} {text}")


def _cell(record: CompositionResult, metric: str) -> Cell:
    value = value_text(record.by_metric.get(metric))
    return Cell(value, metric in record.failed_metrics, metric in record.lost_metrics)


def _width(column: Sequence[Cell]) -> int:
    return max(len(cell.text) for cell in column) + 1  # room for the mark
