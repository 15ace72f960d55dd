"""Summary in GitHub Markdown, such as for the job summary of a CI service: failures first, then the table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pytest_lmcompose.report.numbers import MISSING, interval, number, value_text
from pytest_lmcompose.report.sections import best_order
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.report.view import (
    BaselineComparison,
    compare_with_baseline,
    drifting,
    headline_metrics,
    summarise_gates,
)
from pytest_lmcompose.results import CompositionResult, Gate, Report, Row
from pytest_lmcompose.texts import counted

MOST = 20
"""Maximum lines of a list; job summaries are limited to a megabyte."""
ROWS = 100
"""Maximum rows of the table of compositions."""
_SIGNS = {"passed": "✅", "failed": "❌", "lost": "⚠️", "not judged": "⚠️"}


def render(report: Report, baseline: Report | None = None) -> str:
    """Return the summary of a report, with the changes since `baseline`."""
    records = report.compositions
    gates = summarise_gates(records)
    metrics = headline_metrics(records, judged=True)
    model = code_span(report.model.id) if report.model else "no model"
    parts = [
        f"## {_SIGNS[gates.state]} lmcompose: {gates.summary}",
        f"{len(records)} compositions of {model}, seed {escaped(report.seed)}, run {escaped(report.status)}.",
        _bullets(f"{code_span(name)} {escaped(message)}" for name, message in gates.failure_messages),
        _compositions(records, metrics),
        _composability(report, metrics),
        _comparison(compare_with_baseline(report, baseline)),
        _bullets(
            f"{code_span(row.composition)} {escaped(row.metric)} got worse over {len(row.values)} stored runs, "
            f"by {number(row.loss)} in all"
            for row in drifting(report)
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _compositions(records: Sequence[CompositionResult], metrics: Sequence[str]) -> str:
    """Return the table in the order of the tests; failures first if there are too many rows."""
    if len(records) > ROWS:
        records = sorted(records, key=lambda record: summarise_gates([record]).state != "failed")
    left = f"\n\nand {len(records) - ROWS} more compositions" if len(records) > ROWS else ""
    rows = (_row(record, metrics) for record in records[:ROWS])
    return markdown_table(("composition", "gates", *metrics), rows) + left


def _row(record: CompositionResult, metrics: Sequence[str]) -> list[str]:
    measured, gates = record.by_metric, summarise_gates([record])
    outcome = escaped(record.status) if gates.not_measured else gates.gate_counts or MISSING
    marks = dict.fromkeys(record.failed_metrics, " ❌ failed") | dict.fromkeys(record.lost_metrics, " ⚠️ known loss")
    cells = [escaped(value_text(measured.get(metric))) + marks.get(metric, "") for metric in metrics]
    return [code_span(record.id), outcome, *cells]


def _composability(report: Report, metrics: Sequence[str]) -> str:
    """Return both composability metrics, sorted by order sensitivity."""
    composed = report.composability
    entries = [] if composed is None else [e for e in composed.orders if e.metric in metrics]
    rows = [
        (
            escaped(" & ".join(e.steps)),
            escaped(e.metric),
            interval(e.order_free_error),
            interval(e.order_sensitivity),
            code_span(best) if (best := best_order(e)) == e.best else best,
        )
        for e in sorted(entries, key=lambda e: -(0.0 if e.order_sensitivity is None else e.order_sensitivity.value))
    ]
    if not rows or composed is None:
        return ""
    head = ("steps", "metric", "order-free error", "order sensitivity", "best order")
    title = f"**Composability**, with {composed.confidence:.0%} intervals"
    return f"{title}\n\n{markdown_table(head, rows[:MOST])}{_left(len(rows))}"


def _comparison(stored: BaselineComparison | None) -> str:
    """Return the metrics that got worse or better since the baseline."""
    if stored is None:
        return ""
    title = f"**Compared with {escaped(stored.name)}** of {escaped(stored.started)}"
    if stored.compared.problem:
        return f"{title}: nothing can be compared. {escaped(stored.compared.problem)}"
    changed = stored.changed
    better = sum(row.verdict == "better" for row in changed)
    parts = [f"{title}: {len(changed) - better} worse, {better} better"]
    parts.append(_bullets(f"{escaped(d.what)}: {escaped(d.message)}" for d in stored.compared.differences))
    if changed:
        parts.append(_changes(changed))
    return "\n\n".join(filter(None, parts))


def _changes(changed: Sequence[Row]) -> str:
    rows = [
        (
            code_span(row.composition),
            escaped(row.metric),
            escaped(row.verdict),
            *(MISSING if value is None else number(value) for value in (row.old, row.new, row.difference)),
            MISSING if row.p_holm is None else f"{row.p_holm:.2g}",
        )
        for row in changed
    ]
    head = ("composition", "metric", "verdict", "before", "now", "change", "p (Holm)")
    return markdown_table(head, rows[:MOST]) + _left(len(rows))


def render_gates(title: str, gates: Sequence[Gate], rows: Sequence[Row] = ()) -> str:
    """Return the summary of gates without a run, with the metrics that changed."""
    failed = [gate for gate in gates if not gate.passed]
    state = "failed" if failed else "passed" if gates else "not judged"
    parts = [
        f"## {_SIGNS[state]} lmcompose: {len(failed)} of {counted(len(gates), 'gate')} failed",
        escaped(title),
        _bullets(escaped(gate.message) for gate in failed),
        _changes(rows) if rows else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are aligned to the right. The cells of `rows` are escaped already."""
    aligned = ["---"] + ["--:"] * (len(head) - 1)
    lines = [[escaped(name) for name in head], aligned, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    found = list(lines)
    return "\n".join(f"- {line}" for line in found[:MOST]) + _left(len(found))


def _left(n: int) -> str:
    return f"\n\nand {n - MOST} more" if n > MOST else ""


def escaped(text: object) -> str:
    """Escape text for Markdown and HTML, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!@$])", r"\\\1", visible(" ".join(str(text).split())))


def code_span(text: object) -> str:
    """Return text as inline code that is safe in a table."""
    return "`" + visible(" ".join(str(text).split())).replace("`", "'").replace("|", "\\|") + "`"
