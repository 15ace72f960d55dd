"""Terminal tables below the summary: paired gates, composability, interference, survival and return."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from evaluators.metrics import find_metric
from interventions.registry import category_of
from pytest_lmcompose.composition import parse
from pytest_lmcompose.report.closeness import TITLE, closeness_rows
from pytest_lmcompose.report.numbers import MISSING, interval, number, with_error
from pytest_lmcompose.report.terminal import Cell, blocks, write_blocks
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import Composability, CompositionResult, Gate, OrderedSet, Share

Rows = list[list[Cell]]
SHARES = {
    "survival": "survival: value at the end divided by value after the step, ± standard error",
    "returned": "returned: share of the unlearned knowledge that is back at the end, ± standard error",
}


def write_paired(reporter: pytest.TerminalReporter, records: Sequence[CompositionResult], late: Sequence[str]) -> None:
    """Write the gates that compare samples with what they can find, then those that failed only at the end."""
    others = any(gate.reference for record in records for gate in record.gates if gate.paired)
    other = " or another reference" if others else ""
    for rows, title in (
        (
            paired_rows(records),
            f"paired tests against the base model{other}; finds: smallest drop detected with 80 % power; "
            "needs: samples to find a drop, given in brackets",
        ),
        (
            evidence_rows(records),
            "evidence against a loss; below: the loss, with confidence; needs: samples with which a model without any "
            "loss passes, with 80 % power",
        ),
    ):
        if len(rows) > 1:
            reporter.write_line(title, bold=True)
            _write(reporter, rows)
    for message in late:
        reporter.write_line(visible(f"failed when all paired gates were judged together: {message}"), red=True)


def write_composability(
    reporter: pytest.TerminalReporter, found: Composability | None, metrics: Collection[str]
) -> None:
    """Write composability, interference, survival and return of `metrics`."""
    if found is None:
        return
    rows = order_rows(found, metrics)
    if len(rows) > 1:
        reporter.write_line(f"composability, with {found.confidence:.0%} intervals", bold=True)
        _write(reporter, rows)
    rows = interference_rows(found, metrics)
    if len(rows) > 1 and len(rows[0]) > 1:
        reporter.write_line("interference: value at the end minus value after a step, ± standard error", bold=True)
        _write(reporter, rows)
    for kind, title in SHARES.items():
        rows = share_rows(getattr(found, kind), metrics)
        if len(rows) > 1:
            reporter.write_line(title, bold=True)
            _write(reporter, rows)


def write_closeness(reporter: pytest.TerminalReporter, records: Sequence[CompositionResult]) -> None:
    """Write how close the compositions are to the base model, if that was measured."""
    if rows := closeness_rows(records):
        reporter.write_line(TITLE, bold=True)
        _write(reporter, [list(map(Cell, row)) for row in rows])


def paired_rows(records: Sequence[CompositionResult]) -> Rows:
    """Return a header and one row per paired gate."""
    rows = [[Cell(name) for name in ("gate", "value", "base", "p (Holm)", "n", "finds", "needs")]]
    for record in records:
        for gate in record.gates:
            if (paired := gate.paired) is None or gate.value is None or gate.base_value is None:
                continue
            smallest, effect = paired.smallest_drop, "" if paired.effect is None else f" ({paired.effect:.2g})"
            cells = [
                number(gate.value),
                number(gate.base_value),
                f"{paired.p_holm:.2g}",
                str(paired.clusters or paired.n),
                "none" if smallest is None else f"{smallest:.2g}",
                MISSING if paired.needed is None else f"{paired.needed}{effect}",
            ]
            rows.append([_gate(record, gate), *map(Cell, cells)])
            rows += _worse(gate, len(rows[0]))
    return rows


def evidence_rows(records: Sequence[CompositionResult]) -> Rows:
    """Return a header and one row per gate of `not_worse_than`."""
    rows = [[Cell(name) for name in ("gate", "value", "base", "loss", "below", "margin", "n", "needs")]]
    for record in records:
        for gate in record.gates:
            if (found := gate.evidence) is None or gate.value is None or gate.base_value is None:
                continue
            numbers = gate.value, gate.base_value, found.loss, found.upper, found.margin
            needed = MISSING if found.needed is None else str(found.needed)
            cells = [MISSING if x is None else number(x) for x in numbers]
            rows.append([_gate(record, gate), *map(Cell, (*cells, str(found.units), needed))])
            rows += _worse(gate, len(rows[0]))
    return rows


def _gate(record: CompositionResult, gate: Gate) -> Cell:
    of = f" of {gate.reference}" if gate.reference else ""
    pool = f" ({len(gate.pool)} metrics)" if gate.pool else ""
    return Cell(f"{record.id}  {gate.metric}{pool}{of}", not gate.passed)


def _worse(gate: Gate, columns: int) -> Rows:
    """Return a row for each metric of a failed pool that is worse by itself."""
    worse = () if gate.passed else gate.worse
    empty = [Cell(MISSING)] * (columns - 1)
    return [[Cell(f"  {m.metric}: p = {m.p:.2g}, {m.n} samples, drop {m.drop or 0:.3g}"), *empty] for m in worse]


def order_rows(found: Composability, metrics: Collection[str]) -> Rows:
    """Return a header and one row per set of steps and metric."""
    rows = [[Cell(name) for name in ("steps  metric", "best order", "order-free error", "order sensitivity")]]
    for entry in found.orders:
        if entry.metric in metrics:
            name = f"{' & '.join(entry.steps)}  {entry.metric}"
            cells = [
                best_order(entry),
                *(interval(getattr(entry, k)) for k in ("order_free_error", "order_sensitivity")),
            ]
            rows.append([Cell(name), *map(Cell, cells)])
    return rows


def best_order(entry: OrderedSet) -> str:
    """Return the best order, or "tie" if the interval of order sensitivity includes 0."""
    gap = entry.order_sensitivity
    if gap is not None and (gap.value if gap.low is None else gap.low) <= 0:
        return "tie"
    return entry.best or MISSING


def interference_rows(found: Composability, metrics: Collection[str]) -> Rows:
    """Return a header and one row per composition and measured prefix, with the headline metrics as columns."""
    steps = {step.step for entry in found.interference for step in entry.steps}
    categories = {category_of(parse(step).steps[0].method) for step in steps}
    about = {metric: find_metric(metric) for metric in metrics}
    shown = [
        metric
        for metric, of in about.items()
        if of.headline and of.sampled and of.concerns(categories)
        if any(metric in entry.metrics for entry in found.interference)
    ]
    rows = [[Cell(name) for name in ("composition", *shown)]]
    for entry in found.interference:
        for step in entry.steps[:-1]:  # the last is the end itself
            if step.change is not None and step.stderr is not None:
                of = dict(zip(entry.metrics, zip(step.change, step.stderr, strict=True), strict=True))
                cells = [_change(*of.get(metric, (None, None))) for metric in shown]
                rows.append([Cell(f"{entry.composition}  since {step.prefix}"), *map(Cell, cells)])
    return rows


def share_rows(found: Sequence[Share], metrics: Collection[str]) -> Rows:
    """Return a header and one row per composition and step, with one column per metric."""
    shown = [m for m in metrics if any(entry.metric == m for entry in found)]
    table: dict[str, dict[str, Share]] = {}
    for entry in found:
        if entry.metric in shown:
            table.setdefault(f"{entry.composition}  since {entry.prefix}", {})[entry.metric] = entry
    rows = [[Cell(name) for name in ("composition", *shown)]]
    rows += [[Cell(name), *(Cell(_share(of.get(metric))) for metric in shown)] for name, of in table.items()]
    return rows


def _write(reporter: pytest.TerminalReporter, rows: Rows) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    write_blocks(reporter, blocks(columns, reporter._tw.fullwidth))


def _change(value: float | None, error: float | None) -> str:
    if value is None:
        return MISSING
    shown = f"{value:+.3f}" if abs(value) < 100 else f"{value:+.4g}"
    return shown if error is None else f"{shown} ±{number(error)}"


def _share(entry: Share | None) -> str:
    return MISSING if entry is None else with_error(entry.value, entry.stderr, " ±")
