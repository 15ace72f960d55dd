"""The report as one self-contained HTML page: tables, figures and details of every composition.

The Content-Security-Policy blocks every request and every script but the page's own, so names of models and samples
cannot inject code.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pytest_lmcompose.composition import BASE
from pytest_lmcompose.report import figures
from pytest_lmcompose.report.closeness import closeness_rows
from pytest_lmcompose.report.decision import REASONS, decide
from pytest_lmcompose.report.drawing import drawing
from pytest_lmcompose.report.figures import Figure
from pytest_lmcompose.report.numbers import MISSING, number, value_text, with_error
from pytest_lmcompose.report.text import cleaned
from pytest_lmcompose.report.view import (
    ChangedSamples,
    GateSummary,
    changed_samples,
    compare_with_baseline,
    drifting,
    headline_metrics,
    summarise_gates,
)
from pytest_lmcompose.results import CompositionResult, Measured, Report

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES = 12
"""Maximum number of changed samples shown per metric and composition."""
LARGE = 300_000
"""Bytes from which on the later sections of a page are compressed."""
_CUT = "<!-- cut -->"
"""Before and after these sections in a template."""
_NEEDS_SCRIPT = "The other sections are compressed. To read them, allow this page its script, in a browser since 2023."
SHOWN = 3
"""Items shown of a long list in the details of a step."""
_LONG_LIST, _LONG_MAPPING = 8, 16
_ORDER_FREE = (
    f"The error of the best order of the same steps; lower is better. {figures.SHADES} For metrics where lower is "
    "better, the scale starts at the lowest value of any composition. Intervals are in the table."
)
_SENSITIVITY = (
    f"The largest difference between orders of the same steps; 0: order does not matter. {figures.SHADES} "
    "Intervals are in the table."
)
_SURVIVAL = "Effect of an edit after later steps: value at the end / value right after the edit. Bars: 95 % intervals."
_RETURNED = (
    "Share of the unlearned knowledge that later steps, such as compression or an attack, brought back: 0 is none, 1 "
    "is all. Bars: 95 % intervals."
)


@dataclass(frozen=True)
class Cell:
    """A value of the table with its sort key."""

    text: str
    order: float | None
    state: str = ""
    """failed or lost, as in `Gate.state`; empty otherwise."""


@dataclass(frozen=True)
class Line:
    """One row of the table of compositions."""

    record: CompositionResult
    gates: GateSummary
    cells: tuple[Cell, ...]
    seconds: Cell
    memory: Cell


@dataclass(frozen=True)
class Detail:
    """Everything about one composition."""

    record: CompositionResult
    gates: GateSummary
    changes: tuple[tuple[str, tuple[ChangedSamples, ...]], ...]
    """Name of the state compared with, and the samples that changed since."""


def render(report: Report, baseline: Report | None = None) -> str:
    """Return the HTML page of a report, compared with `baseline` if there is one."""
    report, baseline = _cleaned(report), None if baseline is None else _cleaned(baseline)
    records = report.compositions
    metrics = _by_weight(headline_metrics(records), records)
    stored = compare_with_baseline(report, baseline)
    return page(
        "report.html.jinja",
        {} if missing_figures() else _figures(report, metrics),
        report=report,
        decision=decide(report),
        repairs={fix.composition: fix for fix in report.repairs},
        most=REASONS,
        gates=summarise_gates(records),
        closeness=closeness_rows(records),
        measured=_measured(records),
        places={record.id: i for i, record in enumerate(records, start=1)},
        metrics=metrics,
        better=_directions(records),
        lines=[_line(record, metrics) for record in records],
        details=[_detail(record, report, baseline, metrics) for record in records],
        stored=stored,
        rows=() if stored is None else stored.changed_first(metrics),
        drifting=drifting(report),
        missing=MISSING,
    )


def page(template: str, drawn: Mapping[str, Figure], **values: Any) -> str:
    """Return the page of a template with figures, style and scripts, from `values` that are safe to show."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["split_name"] = lambda name: re.split("(?<=[_/])", name)
    environment.filters["pretty"] = _pretty
    environment.filters["abridged"] = _abridged
    environment.filters["drawn"] = drawing
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    found = environment.get_template(template).render(
        figures=drawn,
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=script,
        digest=_digest(script),
        no_figures=missing_figures(),
        **values,
    )
    # Cells and rows end where the next one begins, which saves a tenth of a page.
    return _packed(re.sub(r"\s*</t[dhr]>\s*(?=<(?:t[dhr]|/t(?:r|head|body))\b)", "", str(found)))


def _packed(text: str) -> str:
    """Return a page whose later sections are compressed if it is large; its script unpacks them."""
    first, *rest = text.split(_CUT)
    if not rest or len(text.encode()) <= LARGE:
        return first + "".join(rest)
    data = base64.b64encode(gzip.compress(rest[0].encode(), mtime=0)).decode()
    return f'{first}<p class="notice" id="packed" data-gzip="{data}">{_NEEDS_SCRIPT}</p>{rest[1]}'


def missing_figures() -> str | None:
    """Return why pages have no figures here, or None if they have."""
    if importlib.util.find_spec("vl_convert") is not None:
        return None
    return "no figures; install the extra html: pip install 'pytest-lmcompose[html]'"


def _by_weight(metrics: Sequence[str], records: Sequence[CompositionResult]) -> list[str]:
    """Sort metrics: failed gates first, then known losses, then other gates."""
    gates = [gate for record in records for gate in record.gates]
    states = {
        state: {metric for gate in gates if gate.state == state for metric in gate.metrics}
        for state in ("failed", "lost", "passed")
    }
    return sorted(metrics, key=lambda metric: [metric not in found for found in states.values()])


def _figures(report: Report, metrics: Sequence[str]) -> dict[str, Figure]:
    """Return the figures by key; without data there is no figure."""
    records, composed = report.compositions, report.composability
    found: list[Figure | None] = []
    if composed is not None:
        size, floor = figures.sizes(records), figures.floors(records)
        found += [
            figures.orders(composed, metrics, size, floor, "order_sensitivity", "Order sensitivity", _SENSITIVITY),
            figures.orders(composed, metrics, size, floor, "order_free_error", "Order-free error", _ORDER_FREE),
            figures.interference(composed, metrics, size, _directions(records)),
            figures.shares(composed.survival, metrics, "survival", "Survival of edits", _SURVIVAL, 1.0),
            figures.shares(composed.returned, metrics, "returned", "Returned knowledge", _RETURNED, 0.0),
        ]
    found += [figures.curves(records, metrics, setting) for setting in figures.CURVES]
    found += [figures.sequences(records), figures.costs(records)]
    return {figure.key: figure for figure in found if figure is not None}


def _line(record: CompositionResult, metrics: Sequence[str]) -> Line:
    measured = record.by_metric
    cells = tuple(
        Cell(value_text(found), None if found is None else found.value, _state(record, metric))
        for metric, found in ((metric, measured.get(metric)) for metric in metrics)
    )
    steps = record.steps
    spent = sum(step.seconds for step in steps) + (record.evaluate_seconds or 0.0)
    peak = max((step.peak_memory_bytes for step in steps), default=None)
    gib = None if peak is None else peak / 2**30
    memory = Cell(MISSING if gib is None else f"{gib:.2f}", gib)
    return Line(record, summarise_gates([record]), cells, Cell(f"{spent:.1f}", spent), memory)


def _state(record: CompositionResult, metric: str) -> str:
    return "failed" if metric in record.failed_metrics else "lost" if metric in record.lost_metrics else ""


def _detail(record: CompositionResult, report: Report, baseline: Report | None, metrics: Sequence[str]) -> Detail:
    base = next((r for r in report.compositions if r.id == BASE), None)
    since: list[tuple[str, CompositionResult]] = []
    if base is not None and base is not record:
        since.append(("the base model", base))
    stored = None if baseline is None else next((r for r in baseline.compositions if r.id == record.id), None)
    if stored is not None:
        since.append(("the baseline", stored))
    changes = [(name, changed_samples(old, record, metrics, report, SAMPLES)) for name, old in since]
    return Detail(
        record,
        summarise_gates([record]),
        tuple((name, tuple(found)) for name, found in changes if found),
    )


def _directions(records: Sequence[CompositionResult]) -> dict[str, bool]:
    return {m.metric: m.higher_is_better for record in records for m in record.measurements}


def _measured(records: Sequence[CompositionResult]) -> list[tuple[Measured, list[tuple[str, str]]]]:
    """Return the first measurement of each metric, and its value with the state of its gates for each composition."""
    first: dict[str, Measured] = {}
    for record in records:
        first = {**record.by_metric, **first}
    tables = [(record, record.by_metric) for record in records]
    return [
        (of, [(_shown(table.get(name)), _state(record, name)) for record, table in tables])
        for name, of in first.items()
    ]


def _shown(measured: Measured | None) -> str:
    if measured is None or measured.value is None:
        return value_text(measured)
    return with_error(measured.value, measured.stderr)


def _abridged(value: Any) -> Any:
    """Return plain data with only the first items of long lists, such as one for each layer of a large model."""
    if isinstance(value, Mapping):
        items = [(key, _abridged(item)) for key, item in value.items()]
        return dict(items if len(items) <= _LONG_MAPPING else [*items[:SHOWN], ("...", _more(len(items)))])
    if isinstance(value, list | tuple):
        found = list(map(_abridged, value[:SHOWN] if len(value) > _LONG_LIST else value))
        return found if len(value) <= _LONG_LIST else [*found, _more(len(value))]
    return value


def _more(n: int) -> str:
    return f"{n - SHOWN} more, all in the JSON report"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _cleaned(report: Report) -> Report:
    return msgspec.convert(cleaned(msgspec.to_builtins(report)), Report)


def _pretty(value: Mapping[str, Any]) -> str:
    import yaml

    return str(
        yaml.safe_dump(
            msgspec.to_builtins(value), default_flow_style=None, sort_keys=False, allow_unicode=True, width=100
        )
    )
