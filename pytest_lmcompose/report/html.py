"""The report as one page: tables, figures and details of every composition, in a file that needs no network.

The browser is told to load nothing and to run these scripts alone, whatever a model or a sample is called.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pytest_lmcompose.composition import BASE
from pytest_lmcompose.report import figures
from pytest_lmcompose.report.figures import Figure
from pytest_lmcompose.report.numbers import MISSING, number, value_text, with_error
from pytest_lmcompose.report.text import cleaned
from pytest_lmcompose.report.view import (
    ChangedSamples,
    Verdicts,
    against,
    changed_samples,
    drifting,
    headline_metrics,
    verdicts,
)
from pytest_lmcompose.results import CompositionResult, Measured, Report

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES = 12
"""Changed samples that are shown of a metric of a composition."""
_ORDER_FREE = (
    f"The error that is left under the best order of the same steps: lower is better. {figures.SHADES} Metrics that "
    "are better lower count from the least value of any composition. "
    "Intervals are in the table."
)
_SENSITIVITY = (
    f"How far the orders of the same steps lie apart: 0 means that order does not matter. {figures.SHADES} "
    "Intervals are in the table."
)
_SURVIVAL = "What later steps left of an edit: value at the end over value right after the step; 1 is all. Bars: 95 %."
_RETURNED = (
    "Share of the removed knowledge that later steps, compression or an attack, brought back: 0 is none, 1 is all. "
    "Bars: 95 %."
)


@dataclass(frozen=True)
class Cell:
    """A value of the table, and what it is sorted by."""

    text: str
    order: float | None
    failed: bool = False


@dataclass(frozen=True)
class Line:
    """One composition in the table."""

    record: CompositionResult
    verdicts: Verdicts
    cells: tuple[Cell, ...]
    seconds: Cell
    memory: Cell


@dataclass(frozen=True)
class Detail:
    """One composition with everything about it."""

    record: CompositionResult
    verdicts: Verdicts
    measurements: tuple[tuple[Measured, str, str, str, bool], ...]
    """Each with its value, that of the base model and the difference as text, and whether a gate of it failed."""
    changes: tuple[tuple[str, tuple[ChangedSamples, ...]], ...]
    """Samples that changed, since what."""


def render(document: Report, baseline: Report | None = None) -> str:
    """Return the page of a report document, held against a stored one where there is a `baseline`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    document, baseline = _cleaned(document), None if baseline is None else _cleaned(baseline)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["pretty"] = _pretty
    records = document.compositions
    judged = verdicts(records)
    metrics = _by_weight(headline_metrics(records), records)
    drawn = {} if undrawn() else _figures(document, metrics)
    stored = against(document, baseline)
    scripts = [_vega() if drawn else "", (TEMPLATES / "page.js").read_text(encoding="utf-8")]
    specs = [plot.spec for figure in drawn.values() for plot in figure.plots]
    page = environment.get_template("report.html.jinja").render(
        document=document,
        verdicts=judged,
        failures=judged.told,
        places={record.id: i for i, record in enumerate(records, start=1)},
        metrics=metrics,
        better=_directions(records),
        lines=[_line(record, metrics) for record in records],
        figures=drawn,
        details=[_detail(record, document, baseline, metrics) for record in records],
        stored=stored,
        rows=() if stored is None else stored.first(metrics),
        drifting=drifting(document),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        scripts=scripts,
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        specs=_inert(json.dumps(specs, separators=(",", ":"), allow_nan=False)),
        missing=MISSING,
        undrawn=undrawn(),
    )
    return str(page)


def undrawn() -> str | None:
    """Say why pages have no figures, if they have none here."""
    if importlib.util.find_spec("vl_convert") is not None:
        return None
    return "the page has no figures; they need the extra html: pip install 'pytest-lmcompose[html]'"


def _by_weight(metrics: Sequence[str], records: Sequence[CompositionResult]) -> list[str]:
    """Return metrics with those first whose gates failed, then those that were judged."""
    gates = [gate for record in records for gate in record.gates]
    failed = {gate.metric for gate in gates if not gate.passed}
    judged = {gate.metric for gate in gates}
    return sorted(metrics, key=lambda metric: (metric not in failed, metric not in judged))


def _figures(document: Report, metrics: Sequence[str]) -> dict[str, Figure]:
    """Return the figures that the document has data for, by key."""
    records, composed = document.compositions, document.composability
    found: list[Figure | None] = []
    if composed is not None:
        size, floor = figures.sizes(records), figures.floors(records)
        found += [
            figures.orders(composed, metrics, size, floor, "order_sensitivity", "Order sensitivity", _SENSITIVITY),
            figures.orders(composed, metrics, size, floor, "order_free_error", "Order-free error", _ORDER_FREE),
            figures.interference(composed, metrics, size, _directions(records)),
            figures.shares(composed.survival, metrics, "survival", "Survival of edits", _SURVIVAL, 1.0),
            figures.shares(composed.returned, metrics, "returned", "Removed knowledge that is back", _RETURNED, 0.0),
        ]
    found += [figures.curves(records, metrics, setting) for setting in figures.CURVES]
    found.append(figures.costs(records))
    return {figure.key: figure for figure in found if figure is not None}


def _line(record: CompositionResult, metrics: Sequence[str]) -> Line:
    measured = record.by_metric
    cells = tuple(
        Cell(value_text(found), None if found is None else found.value, metric in record.failed_metrics)
        for metric, found in ((metric, measured.get(metric)) for metric in metrics)
    )
    steps = record.steps
    spent = sum(step.seconds for step in steps) + (record.evaluate_seconds or 0.0)
    peak = max((step.peak_memory_bytes for step in steps), default=None)
    gib = None if peak is None else peak / 2**30
    memory = Cell(MISSING if gib is None else f"{gib:.2f}", gib)
    return Line(record, verdicts([record]), cells, Cell(f"{spent:.1f}", spent), memory)


def _detail(record: CompositionResult, document: Report, baseline: Report | None, metrics: Sequence[str]) -> Detail:
    base = next((r for r in document.compositions if r.id == BASE), None)
    before = {} if base is None or base is record else base.by_metric
    measurements = []
    for measured in record.measurements:
        old = before.get(measured.metric)
        change = MISSING
        if old is not None and old.value is not None and measured.value is not None:
            change = f"{measured.value - old.value:+.3g}"
        value = value_text(measured)
        if measured.value is not None:
            value = with_error(measured.value, measured.stderr)
        measurements.append((measured, value, value_text(old), change, measured.metric in record.failed_metrics))
    since: list[tuple[str, CompositionResult]] = []
    if base is not None and base is not record:
        since.append(("the base model", base))
    stored = None if baseline is None else next((r for r in baseline.compositions if r.id == record.id), None)
    if stored is not None:
        since.append(("the baseline", stored))
    changes = [(name, changed_samples(old, record, metrics, document, SAMPLES)) for name, old in since]
    return Detail(
        record,
        verdicts([record]),
        tuple(measurements),
        tuple((name, tuple(found)) for name, found in changes if found),
    )


def _directions(records: Sequence[CompositionResult]) -> dict[str, bool]:
    return {m.metric: m.higher_is_better for record in records for m in record.measurements}


@functools.cache
def _vega() -> str:
    """Return Vega-Lite and what it needs as one script, which takes seconds to put together."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=figures.VEGA_LITE)
    return _inert(str(bundle), script=True)


def _inert(text: str, *, script: bool = False) -> str:
    """Return a script, or JSON, that cannot end the element it stands in."""
    return re.sub("<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE) if script else text.replace("<", r"\u003c")


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
