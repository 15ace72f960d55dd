"""The summary table, composition by metric, and the progress lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

FAILED = "!"
MISSING = "-"
GAP = 2


@dataclass(frozen=True)
class Cell:
    """A value as shown; a failed one is marked."""

    text: str
    failed: bool = False


def table(records: Sequence[Mapping[str, Any]], width: int, wanted: Callable[[str], bool]) -> list[list[list[Cell]]]:
    """Return blocks of rows, each block as many metrics as fit into `width` characters.

    The first row of a block is its head, the first cell of a row its composition. Shown are the
    metrics that a gate judged, and those that are `wanted`.
    """
    shown = shown_metrics(records, wanted)
    columns = [[Cell(name), *(_cell(record, name) for record in records)] for name in shown]
    return blocks([[Cell("composition"), *(Cell(r["id"], bool(r["error"])) for r in records)], *columns], width)


def shown_metrics(records: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> list[str]:
    """Return the metrics that a gate judged or that are wanted, those that are missing last."""
    metrics = list(dict.fromkeys(m["metric"] for r in records for m in r["measurements"]))
    judged = {gate["metric"] for r in records for gate in r["gates"]}
    missing = [name for name in sorted(judged) if name not in metrics]
    return [name for name in metrics if name in judged or wanted(name)] + missing


def blocks(columns: Sequence[list[Cell]], width: int) -> list[list[list[Cell]]]:
    """Return blocks of rows, each with the first column and as many others as fit into `width`."""
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
            for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
                text = cell.text + (FAILED if cell.failed else "")
                padded = text.ljust(width) if i == 0 else " " * GAP + text.rjust(width)
                reporter.write(padded, red=cell.failed, bold=line == 0)
            reporter.write("\n")
        reporter.write("\n")


def write_summary(
    reporter: pytest.TerminalReporter, records: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]
) -> None:
    """Write the table of a run under a heading of its own."""
    reporter.section("lmcompose", sep="=")
    write_blocks(reporter, table(records, reporter._tw.fullwidth, wanted))
    for record in records:
        if record["error"]:
            reporter.write_line(f"{record['id']}: {record['error']}", red=True)
    if any(not gate["passed"] for record in records for gate in record["gates"]):
        reporter.write_line(f"{FAILED} a gate failed")


class Progress:
    """Writes a line to the user at once, though pytest captures output."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def __call__(self, line: str) -> None:
        capture = self._config.pluginmanager.getplugin("capturemanager")
        if capture is None:
            self._write(line)
        else:
            with capture.global_and_fixture_disabled():
                self._write(line)

    def _write(self, line: str) -> None:
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        if worker is not None:  # a worker has no terminal, but shares the controller's stderr
            sys.stderr.write(f"\n[{worker}] {line}\n")
            sys.stderr.flush()
            return
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)
            reporter.flush()


def _cell(record: Mapping[str, Any], metric: str) -> Cell:
    failed = any(gate["metric"] == metric and not gate["passed"] for gate in record["gates"])
    for measurement in record["measurements"]:
        if measurement["metric"] == metric:
            value = measurement["value"]
            text = measurement.get("nonfinite", "nan") if value is None else number(value)
            return Cell(text, failed)
    return Cell(MISSING, failed)


def number(value: float) -> str:
    """Return a value as tables show it."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _width(column: Sequence[Cell]) -> int:
    # One character is kept for the mark, so that a failure does not move the columns.
    return max(len(cell.text) for cell in column) + len(FAILED)
