"""LaTeX tables of order-free error and order sensitivity, steps by metric, as in the paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pytest_lmcompose.report.numbers import interval
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.report.view import headline_metrics
from pytest_lmcompose.results import Composability, Interval, OrderedSet, Report

TABLES = (("order_free_error", "Order-free error"), ("order_sensitivity", "Order sensitivity"))
MISSING = "--"
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "→": r"$\rightarrow$",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def render(report: Report) -> str:
    """Return both tables of a report, or a comment if no steps ran in several orders."""
    composed = report.composability
    entries = () if composed is None else composed.orders
    metrics = [m for m in headline_metrics(report.compositions) if any(e.metric == m for e in entries)]
    head = [
        "% Made by pytest-lmcompose; needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.",
        f"% Run of {_text(report.finished)}, {_text(report.status)}.",
    ]
    if not metrics or composed is None:
        return "\n".join([*head, "% No steps were measured in several orders: there is nothing to compare.", ""])
    tables = [_table(kind, title, entries, metrics, _caption(report, composed)) for kind, title in TABLES]
    return "\n".join([*head, *tables, ""])


def _caption(report: Report, composed: Composability) -> str:
    """Return model, seed, repeats and intervals for the caption."""
    model = report.model.id if report.model else "no model"
    runs = f"seed {report.seed}" + (f", {report.repeats} repeats" if report.repeats != 1 else "")
    return f"{_text(model)}, {_text(runs)}; {composed.confidence * 100:.0f}\\,\\% bootstrap intervals in brackets"


def _table(kind: str, title: str, entries: Sequence[OrderedSet], metrics: Sequence[str], caption: str) -> str:
    by_steps: dict[str, dict[str, OrderedSet]] = {}
    for entry in entries:
        by_steps.setdefault(_text(" & ".join(entry.steps)), {})[entry.metric] = entry
    samples = [f"{_text(m)}: n = {_text(next(e.n for e in entries if e.metric == m))}" for m in metrics]
    lines = [
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{title}. {caption}; {', '.join(samples)}.}}",
        f"\\label{{tab:{kind.replace('_', '-')}}}",
        f"\\begin{{tabular}}{{l{'r' * len(metrics)}}}",
        r"\toprule",
        f"Steps & {' & '.join(map(_text, metrics))} \\\\",
        r"\midrule",
        *(f"{steps} & {' & '.join(_cell(of.get(m), kind) for m in metrics)} \\\\" for steps, of in by_steps.items()),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _cell(entry: OrderedSet | None, kind: str) -> str:
    found: Interval | None = getattr(entry, kind, None)
    return MISSING if found is None else interval(found)


def _text(text: object) -> str:
    """Escape text for LaTeX, in one line; {} keeps a leading [ or * from being read as an argument of a line break."""
    found = re.sub(".", lambda match: _SPECIAL.get(match.group(), match.group()), visible(" ".join(str(text).split())))
    return "{}" + found if found.startswith(("[", "*")) else found
