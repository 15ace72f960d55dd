"""Figures of the HTML page as Vega-Lite specifications, each with a table of its data.

Names of models, methods and metrics are only ever values, not field names, because Vega parses field names.
Colours of text and axes come from the page; see `report.drawing`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lmcompose.composition import Composition, Step, parse
from pytest_lmcompose.report.numbers import MISSING, interval, number, value_text, with_error
from pytest_lmcompose.report.sections import best_order
from pytest_lmcompose.results import Composability, CompositionResult, Interval, Measured, OrderedSet, Share

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.drift import Series

Spec = dict[str, Any]
Values = list[dict[str, Any]]
VEGA_LITE = "6.4"
CURVES = {"bits": "bits (setting)", "sparsity": "sparsity (setting)"}
"""Settings on the x axis of the curves."""
SHADES = "Darker means larger, relative to the metric's range: 1 for shares, otherwise its largest value."
NORMAL = 1.96
"""Standard errors in half of a 95 % interval."""


@dataclass(frozen=True)
class Plot:
    """One plot of a figure."""

    title: str
    spec: Spec
    wide: int = 0
    """Minimum width in pixels; narrower screens scroll."""


@dataclass(frozen=True)
class Figure:
    """Plots with their table and description."""

    key: str
    title: str
    text: str
    plots: tuple[Plot, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sizes(records: Sequence[CompositionResult]) -> dict[str, float]:
    """Return the scale of each metric's shades: 1, or its largest absolute value in any composition."""
    largest: defaultdict[str, float] = defaultdict(float)
    for record in records:
        for measured in record.measurements:
            largest[measured.metric] = max(largest[measured.metric], 1.0, abs(measured.value or 0.0))
    return largest


def floors(records: Sequence[CompositionResult]) -> dict[str, float]:
    """Return the lowest value of each metric in any composition."""
    least: dict[str, float] = {}
    for record in records:
        for measured in record.measurements:
            if measured.value is not None:
                least[measured.metric] = min(least.get(measured.metric, measured.value), measured.value)
    return least


def orders(
    found: Composability,
    metrics: Sequence[str],
    size: Mapping[str, float],
    floor: Mapping[str, float],
    kind: str,
    title: str,
    text: str,
) -> Figure | None:
    """Return the heatmap of order_free_error or order_sensitivity: sets of steps by metric."""
    chosen = [entry for entry in found.orders if entry.metric in metrics]
    entries = [(entry, of) for entry in chosen if (of := getattr(entry, kind)) is not None]
    if not entries:
        return None
    shades = _shades([_strength(entry, of, kind, size, floor) for entry, of in entries])
    values: Values = [
        {
            "row": " & ".join(entry.steps),
            "column": entry.metric,
            "shade": shade,
            "text": number(of.value),
            "full": interval(of),
            "best": best_order(entry),
        }
        for (entry, of), shade in zip(entries, shades, strict=True)
    ]
    tooltips = (("row", "steps"), ("column", "metric"), ("full", title.lower()), ("best", "best order"))
    plot = _heatmap(title, values, tooltips, {"scheme": "blues"}, [0, 1], "datum.shade > 0.7")
    rows = tuple((v["row"], v["column"], v["full"], v["best"]) for v in values)
    return Figure(kind, title, text, (plot,), ("steps", "metric", title.lower(), "best order"), rows)


def _strength(
    entry: OrderedSet, of: Interval, kind: str, size: Mapping[str, float], floor: Mapping[str, float]
) -> float:
    """Return how bad a value is, from 0 to 1; where lower is better, 0 is the lowest value of any composition."""
    value, metric = of.value, entry.metric
    if kind == "order_free_error" and not entry.higher_is_better and size[metric] > floor[metric]:
        return float((value - floor[metric]) / (size[metric] - floor[metric]))
    return float(value / size[metric])


def interference(
    found: Composability, metrics: Sequence[str], size: Mapping[str, float], better: Mapping[str, bool]
) -> Figure | None:
    """Return the heatmap of changes by later steps: compositions with their prefix by metric."""
    changes = [
        (f"{entry.composition} since {step.prefix}", metric, change, error)
        for entry in found.interference
        for step in entry.steps[:-1]  # the last is the end itself
        if step.change is not None and step.stderr is not None
        for metric, change, error in zip(entry.metrics, step.change, step.stderr, strict=True)
        if metric in metrics and change is not None
    ]
    if not changes:
        return None
    gains = [change / size[metric] * (1 if better[metric] else -1) for _, metric, change, _ in changes]
    values: Values = [
        {
            "row": row,
            "column": metric,
            "shade": shade,
            "text": f"{'+' if change > 0 else ''}{number(change)}",
            "full": with_error(change, error),
        }
        for (row, metric, change, error), shade in zip(changes, _shades(gains), strict=True)
    ]
    tooltips = (("row", "composition"), ("column", "metric"), ("full", "change"))
    plot = _heatmap("Interference", values, tooltips, {"scheme": "redblue"}, [-1, 1], "abs(datum.shade) > 0.7")
    text = (
        "Value at the end minus value right after a step, with its standard error. Red: later steps made it worse; "
        f"blue: better. {SHADES}"
    )
    rows = tuple((v["row"], v["column"], v["full"]) for v in values)
    return Figure("interference", "Interference", text, (plot,), ("composition", "metric", "change"), rows)


def curves(records: Sequence[CompositionResult], metrics: Sequence[str], setting: str) -> Figure | None:
    """Return curves of every metric over a setting, for steps measured with several of its values."""
    series: defaultdict[str, dict[float, CompositionResult]] = defaultdict(dict)
    for record in records:
        for name, value in _along(record, setting):
            series[name][value] = record
    series = defaultdict(dict, {name: points for name, points in series.items() if len(points) > 1})
    if not series:
        return None
    base = next((r.by_metric for r in records if not r.requested), dict[str, Measured]())
    plots, table = [], []
    for metric in metrics:
        values: Values = []
        for name, points in series.items():
            for x, record in sorted(points.items()):
                measured = record.by_metric.get(metric)
                if measured is not None:
                    table.append((name, f"{x:g}", metric, _measured_text(measured)))
                if measured is not None and measured.value is not None:
                    y, error = measured.value, measured.stderr or 0.0
                    full = with_error(y, measured.stderr)
                    values.append({"series": name, "x": x, "y": y, "low": y - error, "high": y + error, "full": full})
        if values:
            plots.append(
                Plot(metric, _curve(values, CURVES[setting], base[metric].value if metric in base else None), 300)
            )
    text = (
        f"Each metric by {CURVES[setting]}, everything else being equal; bars are standard errors, the dashed line is "
        "the base model. The dot · stands for the setting in the name of a composition."
    )
    head = ("composition", setting, "metric", "value")
    return Figure(f"curves-{setting}", f"Against {setting}", text, tuple(plots), head, tuple(table)) if plots else None


def sequences(records: Sequence[CompositionResult]) -> Figure | None:
    """Return the curve of each sequence of edits: success at the end by when the edits were made."""
    values: Values = []
    rows = []
    for record in records:
        for metric, measured in record.by_metric.items():
            name, _, edits = metric.partition("/")
            if name == "edit_survival":
                rows.append((record.id, edits, _measured_text(measured)))
                if measured.value is not None:
                    y, error = measured.value, measured.stderr or 0.0
                    point = {"x": int(edits.rpartition("-")[2]), "y": y, "low": y - error, "high": y + error}
                    values.append({"series": record.id, **point, "full": rows[-1][2]})
    if not rows:
        return None
    text = (
        "Success of edits at the end, by when they were made: first ones on the left. The place on the axis is the "
        "number of edits made until then; bars are standard errors."
    )
    plots = (Plot("edit_survival", _curve(values, "edits made", None), 420),) if values else ()
    return Figure(
        "sequence", "Survival over the sequence of edits", text, plots, ("composition", "edits", "success"), tuple(rows)
    )


def trend(numbers: Sequence[int], found: Sequence[Series]) -> Spec:
    """Return a plot for each metric, over runs with these numbers, with a curve for each composition."""
    plots = []
    for metric in dict.fromkeys(entry.metric for entry in found):
        values: Values = []
        for entry in found:
            for place, measured in entry.points if entry.metric == metric else ():
                y, error = measured.number, measured.stderr or 0.0
                full = with_error(y, measured.stderr)
                point = {"x": numbers[place], "y": y, "low": y - error, "high": y + error, "full": full}
                values.append({"series": entry.composition, **point})
        plots.append(_curve(values, "number of the run", None) | {"title": metric, "width": 560})
    return {"$schema": plots[0]["$schema"], "background": "white"} | {
        "vconcat": [{key: part for key, part in plot.items() if key not in ("$schema", "autosize")} for plot in plots],
        "resolve": {"scale": {key: "independent" for key in ("color", "shape", "strokeDash")}},
    }


def shares(
    found: Sequence[Share], metrics: Sequence[str], kind: str, title: str, text: str, goal: float
) -> Figure | None:
    """Return shares with their intervals, `survival` or `returned`; `goal` is where a line is drawn.

    Drawn are those of `metrics`, if there are any; the table has all.
    """
    drawn = [e for e in found if e.metric in metrics] or found
    values: Values = [
        {
            "row": f"{e.composition} since {e.prefix}",
            "series": e.metric,
            "x": e.value,
            "low": e.value - NORMAL * (e.stderr or 0.0),
            "high": e.value + NORMAL * (e.stderr or 0.0),
            "full": with_error(e.value, e.stderr),
        }
        for e in drawn
        if e.value is not None
    ]
    rows = tuple((f"{e.composition} since {e.prefix}", e.metric, with_error(e.value, e.stderr), e.note) for e in found)
    if not rows:
        return None
    plots = (Plot(title, _dots(values, goal), 420),) if values else ()
    return Figure(kind, title, text, plots, ("composition", "metric", "share", "how"), rows)


def costs(records: Sequence[CompositionResult]) -> Figure | None:
    """Return the seconds and the peak memory of every step, and the seconds of evaluation."""
    seconds: Values = []
    memory: Values = []
    rows = []
    for record in records:
        for place, step in enumerate(record.steps):
            gib = step.peak_memory_bytes / 2**30
            part = {"row": record.id, "part": step.method, "place": place}
            seconds.append({**part, "x": step.seconds, "full": f"{step.seconds:.1f} s"})
            memory.append({**part, "x": gib, "full": f"{gib:.2f} GiB"})
            rows.append((record.id, step.id, f"{step.seconds:.1f}", f"{gib:.2f}"))
        if record.evaluate_seconds is not None:
            spent = record.evaluate_seconds
            seconds.append({"row": record.id, "part": "evaluation", "place": 99, "x": spent, "full": f"{spent:.1f} s"})
            rows.append((record.id, "evaluation", f"{spent:.1f}", MISSING))
    if not rows:
        return None
    plots = [Plot("Seconds", _bars(seconds, "seconds", stack=True), 420)]
    if memory:
        plots.append(Plot("Peak memory of a step", _bars(memory, "GiB", stack=False), 420))
    text = (
        "Seconds of every step and of evaluation, and the peak memory while a step ran. A state that compositions "
        "share was built once; its time stands at each of them."
    )
    return Figure(
        "costs", "Seconds and peak memory", text, tuple(plots), ("composition", "part", "seconds", "GiB"), tuple(rows)
    )


def front(values: Values, cost: str, head: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Figure:
    """Return the trials of a search by cost (`x`) and least margin (`y`), with a line through those on the front."""
    x: Spec = {"field": "x", "type": "quantitative", "title": cost, "scale": {"zero": False}}
    y: Spec = {"field": "y", "type": "quantitative", "title": "least margin", "scale": {"zero": False}}
    tooltip = _tooltip([("row", "settings"), ("full", cost), ("series", "trial")])
    on_front = {"filter": "datum.front"}
    layers: list[Spec] = [
        {
            "data": {"values": [{"y": 0}]},
            "mark": {"type": "rule", "strokeDash": [3, 4], "color": "#808080"},
            "encoding": {"y": y},
        },
        {"transform": [on_front], "mark": {"type": "line", "interpolate": "step-after"}, "encoding": {"x": x, "y": y}},
        {
            "mark": {"type": "point", "filled": True, "size": 70},
            "encoding": {"x": x, "y": y, "color": _series(values), "shape": _series(values), "tooltip": tooltip},
        },
    ]
    text = "The least margin of all gates, as a share of the limit: below 0, a gate fails. The line joins the front."
    plot = Plot("Front", _spec(values, 320, layer=layers))
    return Figure("front", "Front", text, (plot,), head, rows)


def _along(record: CompositionResult, setting: str) -> list[tuple[str, float]]:
    """Return for each step with `setting` the composition's name without its value, and the value."""
    if len(record.requested) != len(record.steps):
        return []
    found = []
    steps = [parse(text).steps[0] for text in record.requested]
    for i, (step, ran) in enumerate(zip(steps, record.steps, strict=True)):
        value = ran.settings.get(setting)
        if isinstance(value, int | float) and not isinstance(value, bool):
            kept = tuple(pair for pair in step.settings if pair[0] != setting)
            marked = Step(step.method, (*kept, (setting, "·")))
            found.append((str(Composition((*steps[:i], marked, *steps[i + 1 :]))), float(value)))
    return found


def _measured_text(measured: Measured) -> str:
    if measured.value is None:
        return value_text(measured)
    return with_error(measured.value, measured.stderr)


def _heatmap(
    title: str,
    values: Values,
    tooltips: Sequence[tuple[str, str]],
    colours: Spec,
    domain: list[float],
    strong: str,
) -> Plot:
    columns = len({value["column"] for value in values})
    x: Spec = {"field": "column", "type": "nominal", "sort": None, "title": None}
    x["axis"] = {"orient": "top", "labelAngle": -30, "labelLimit": 170, "ticks": False, "domain": False}
    y = _row_axis()
    y["axis"] |= {"ticks": False, "domain": False}
    shade: Spec = {"field": "shade", "type": "quantitative", "legend": None}
    shade["scale"] = {**colours, "domain": domain}
    text: Spec = {"field": "text", "type": "nominal"}
    layers: list[Spec] = [
        {"mark": {"type": "rect"}, "encoding": {"color": shade}},
        {
            "mark": {"type": "text", "fontSize": 12},
            "encoding": {"text": text, "color": {"condition": {"test": strong, "value": "white"}, "value": "#111"}},
        },
    ]
    spec = _spec(values, 30 * _rows(values), layer=layers, encoding={"x": x, "y": y, "tooltip": _tooltip(tooltips)})
    return Plot(title, spec, 240 + 72 * columns)


def _curve(values: Values, axis: str, base: float | None) -> Spec:
    places = sorted({value["x"] for value in values})
    x: Spec = {"field": "x", "type": "quantitative", "title": axis, "scale": {"zero": False, "nice": False}}
    x["scale"]["padding"] = 12
    x["axis"] = {"values": places, "grid": False}
    y: Spec = {"field": "y", "type": "quantitative", "title": None, "scale": {"zero": False}}
    series = _series(values)
    tooltips = [("series", "composition"), ("x", axis), ("full", "value")]
    layers: list[Spec] = [
        {"mark": "rule", "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": series}},
        {"mark": "line", "encoding": {"x": x, "y": y, "color": series, "strokeDash": series}},
        {
            "mark": {"type": "point", "filled": True, "size": 70},
            "encoding": {"x": x, "y": y, "color": series, "shape": series, "tooltip": _tooltip(tooltips)},
        },
    ]
    if base is not None:
        line: Spec = {"data": {"values": [{"y": base, "full": f"base {number(base)}"}]}}
        line["mark"] = {"type": "rule", "strokeDash": [3, 4], "color": "#808080"}
        line["encoding"] = {"y": {**y}, "tooltip": {"field": "full", "type": "nominal", "title": "value"}}
        layers.insert(0, line)
    return _spec(values, 210, layer=layers)


def _dots(values: Values, goal: float) -> Spec:
    y = _row_axis()
    x: Spec = {"field": "x", "type": "quantitative", "title": "share", "scale": {"zero": True}}
    series = _series(values)
    offset: Spec = {"field": "series", "type": "nominal", "sort": None}
    tooltip = _tooltip([("row", "composition"), ("series", "metric"), ("full", "share")])
    several = len({value["series"] for value in values})
    layers: list[Spec] = [
        {
            "data": {"values": [{"x": goal}]},
            "mark": {"type": "rule", "strokeDash": [3, 4], "color": "#808080"},
            "encoding": {"x": x},
        },
        {
            "mark": "rule",
            "encoding": {"y": y, "yOffset": offset, "x": {**x, "field": "low"}, "x2": {"field": "high"}}
            | {"color": series},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70},
            "encoding": {
                "y": y,
                "yOffset": offset,
                "x": x,
                "color": series,
                "shape": series,
                "tooltip": tooltip,
            },
        },
    ]
    return _spec(values, max(26, 14 * several) * _rows(values), layer=layers)


def _bars(values: Values, unit: str, *, stack: bool) -> Spec:
    y = _row_axis()
    x: Spec = {"field": "x", "type": "quantitative", "title": unit}
    if not stack:
        x |= {"aggregate": "max"}
    legend = {"orient": "bottom", "title": None, "columns": 4}
    tooltip = _tooltip([("row", "composition")])
    encoding: Spec = {"y": y, "x": x}
    if stack:
        encoding["color"] = {"field": "part", "type": "nominal", "sort": None, "legend": legend}
        encoding["order"] = {"field": "place"}
        tooltip += [{"field": "part", "type": "nominal", "title": "step"}, {"field": "full", "title": unit}]
    else:
        tooltip += [{"aggregate": "max", "field": "x", "type": "quantitative", "format": ".2f", "title": unit}]
    encoding["tooltip"] = tooltip
    return _spec(values, 22 * _rows(values), mark={"type": "bar", "cornerRadiusEnd": 2}, encoding=encoding)


def _shades(strengths: Sequence[float]) -> list[float]:
    """Scale strengths by the largest absolute one."""
    largest = max(map(abs, strengths)) or 1.0
    return [strength / largest for strength in strengths]


def _series(values: Values) -> Spec:
    """Return the encoding of a series; colour and shape use one domain and so share a legend."""
    legend = {"orient": "bottom", "columns": 1, "title": None, "labelLimit": 320}
    domain = list(dict.fromkeys(value["series"] for value in values))
    return {"field": "series", "type": "nominal", "scale": {"domain": domain}, "legend": legend}


def _tooltip(fields: Sequence[tuple[str, str]]) -> list[Spec]:
    return [{"field": field, "type": "nominal", "title": title} for field, title in fields]


def _row_axis() -> Spec:
    return {"field": "row", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260}}


def _rows(values: Values) -> int:
    return len({value["row"] for value in values})


def _spec(values: Values, height: int, **parts: Any) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,  # Vega-Lite warns about step sizes combined with width "container"
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": values},
        **parts,
    }
