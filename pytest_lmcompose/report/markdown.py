"""A summary in GitHub's Markdown, for the job summary of a CI service: what failed first, then the table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pytest_lmcompose.report.numbers import MISSING, interval, number, value_text
from pytest_lmcompose.report.sections import best_order
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.report.view import Against, against, drifting, headline_metrics, verdicts
from pytest_lmcompose.results import CompositionResult, Report

MOST = 20
"""Lines of a list; a job summary is read on a phone, and may not grow over a megabyte."""
ROWS = 100
"""Compositions of the table."""


def render(document: Report, baseline: Report | None = None) -> str:
    """Return the summary of a report document, with what changed since a `baseline`."""
    records = document.compositions
    found = verdicts(records)
    metrics = headline_metrics(records, judged=True)
    sign = "✅" if found.passed else "❌" if found.failed or found.broken else "⚠️"
    model = _code(document.model.id) if document.model else "no model"
    parts = [
        f"## {sign} lmcompose: {found.words}",
        f"{len(records)} compositions of {model}, seed {_text(document.seed)}, run {_text(document.status)}.",
        _bullets(f"{_code(name)} {_text(words)}" for name, words in found.told),
        _compositions(records, metrics),
        _composability(document, metrics),
        _comparison(against(document, baseline)),
        _bullets(
            f"{_code(row.composition)} {_text(row.metric)} got worse over {len(row.values)} stored runs, "
            f"by {number(row.loss)} in all"
            for row in drifting(document)
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _compositions(records: Sequence[CompositionResult], metrics: Sequence[str]) -> str:
    """Return the table in the order of the tests; if there are too many, those that failed first."""
    if len(records) > ROWS:
        records = sorted(records, key=lambda record: not (found := verdicts([record])).failed and not found.broken)
    left = f"\n\nand {len(records) - ROWS} more compositions" if len(records) > ROWS else ""
    return _table(("composition", "gates", *metrics), (_row(record, metrics) for record in records[:ROWS])) + left


def _row(record: CompositionResult, metrics: Sequence[str]) -> list[str]:
    measured, judged = record.by_metric, verdicts([record])
    gates = f"{len(judged.failed)} of {judged.gates} failed" if judged.failed else "passed" if judged.gates else MISSING
    if judged.broken:
        gates = _text(record.status)
    cells = [
        _text(value_text(measured.get(metric))) + (" ❌ failed" if metric in record.failed_metrics else "")
        for metric in metrics
    ]
    return [_code(record.id), gates, *cells]


def _composability(document: Report, metrics: Sequence[str]) -> str:
    """Return both composability metrics, where order mattered most first."""
    composed = document.composability
    entries = [] if composed is None else [e for e in composed.orders if e.metric in metrics]
    rows = [
        (
            _text(" & ".join(e.steps)),
            _text(e.metric),
            interval(e.order_free_error),
            interval(e.order_sensitivity),
            _code(best) if (best := best_order(e)) == e.best else best,
        )
        for e in sorted(entries, key=lambda e: -(0.0 if e.order_sensitivity is None else e.order_sensitivity.value))
    ]
    if not rows or composed is None:
        return ""
    head = ("steps", "metric", "order-free error", "order sensitivity", "best order")
    title = f"**Composability**, with {composed.confidence:.0%} intervals"
    return f"{title}\n\n{_table(head, rows[:MOST])}{_left(len(rows))}"


def _comparison(stored: Against | None) -> str:
    """Return what got worse or better since a stored run."""
    if stored is None:
        return ""
    title = f"**Against {_text(stored.name)}** of {_text(stored.started)}"
    if stored.found.problem:
        return f"{title}: nothing can be compared. {_text(stored.found.problem)}"
    changed = stored.changed
    better = sum(row.verdict == "better" for row in changed)
    parts = [f"{title}: {len(changed) - better} worse, {better} better"]
    parts.append(_bullets(f"{_text(d.what)}: {_text(d.message)}" for d in stored.found.differences))
    rows = [
        (
            _code(row.composition),
            _text(row.metric),
            _text(row.verdict),
            *(MISSING if value is None else number(value) for value in (row.old, row.new, row.difference)),
            MISSING if row.p_holm is None else f"{row.p_holm:.2g}",
        )
        for row in changed
    ]
    if rows:
        head = ("composition", "metric", "verdict", "before", "now", "change", "p (Holm)")
        parts.append(_table(head, rows[:MOST]) + _left(len(rows)))
    return "\n\n".join(filter(None, parts))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    aligned = ["---"] + ["--:"] * (len(head) - 1)
    lines = [[_text(name) for name in head], aligned, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    found = list(lines)
    return "\n".join(f"- {line}" for line in found[:MOST]) + _left(len(found))


def _left(n: int) -> str:
    return f"\n\nand {n - MOST} more" if n > MOST else ""


def _text(text: object) -> str:
    """Return text that Markdown and HTML show as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!@$])", r"\\\1", visible(" ".join(str(text).split())))


def _code(text: object) -> str:
    """Return text as code, which also stands in a table."""
    return "`" + visible(" ".join(str(text).split())).replace("`", "'").replace("|", "\\|") + "`"
