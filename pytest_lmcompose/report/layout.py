"""Columns, order and groups of the terminal table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from interventions.names import near_names
from interventions.registry import category_of
from pytest_lmcompose.composition import BASE, parse
from pytest_lmcompose.report.options import BY_ID, Layout
from pytest_lmcompose.results import CompositionResult

Records = Sequence[CompositionResult]


def shown_metrics(records: Records, wanted: Callable[[str], bool]) -> list[str]:
    """Return the metrics that a gate judged or that are wanted; judged but unmeasured ones last."""
    metrics = _measured(records)
    judged = {metric for r in records for gate in r.gates for metric in gate.metrics}
    missing = [name for name in sorted(judged) if name not in metrics]
    return [name for name in metrics if name in judged or wanted(name)] + missing


def chosen_metrics(records: Records, wanted: Callable[[str], bool], columns: Sequence[str]) -> list[str]:
    """Return the metrics that match the globs `columns`, in that order; without globs, `shown_metrics`."""
    if not columns:
        return shown_metrics(records, wanted)
    known = shown_metrics(records, lambda _: True)
    return list(dict.fromkeys(name for glob in columns for name in known if fnmatchcase(name, glob)))


def arranged(records: Records, layout: Layout) -> Iterator[tuple[str | None, list[CompositionResult]]]:
    """Yield group names and their sorted results; without grouping, one group named None."""
    found = sorted_records(records, layout.sort)
    if layout.group is None:
        yield None, found
        return
    groups: dict[str, list[CompositionResult]] = {}
    for record in found:
        groups.setdefault(_group(record.requested, layout.group), []).append(record)
    yield from groups.items()


def unmatched(records: Records, layout: Layout) -> Iterator[str]:
    """Yield a message for each column or sort metric that matches nothing."""
    known = shown_metrics(records, lambda _: True)
    missing = [("columns", glob) for glob in layout.columns if not any(fnmatchcase(name, glob) for name in known)]
    metric = (layout.sort or BY_ID).removeprefix("-")
    if metric not in (BY_ID, *known):
        missing.append(("sort", metric))
    for flag, name in missing:
        yield f"--lmcompose-{flag}: no metric {name!r} was measured.{near_names(name, known)}"


def _measured(records: Records) -> list[str]:
    return list(dict.fromkeys(m.metric for r in records for m in r.measurements))


def sorted_records(records: Records, sort: str | None) -> list[CompositionResult]:
    """Sort results by a metric, best first, or by id; a leading `-` reverses. Results without a value come last."""
    if sort is None:
        return list(records)
    name, turned = sort.removeprefix("-"), sort.startswith("-")
    if name == BY_ID:
        return sorted(records, key=lambda record: record.id, reverse=turned)

    def rank(record: CompositionResult) -> tuple[bool, float]:
        measured = next((m for m in record.measurements if m.metric == name), None)
        if measured is None or measured.value is None:
            return True, 0.0
        return False, measured.value * (-1 if measured.higher_is_better != turned else 1)

    return sorted(records, key=rank)


def _group(requested: Sequence[str], how: str) -> str:
    steps = [step for text in requested for step in parse(text).steps]
    if not steps:
        return BASE
    if how == "first":
        return str(steps[0])
    return " + ".join(category_of(step.method) for step in steps)
