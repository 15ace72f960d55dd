"""Shares between states of one composition, from its records: what survived, and what came back.

Survival is that of what an edit step achieved, return that of the knowledge that an unlearning step
removed; each where the states that it takes were measured in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from evaluators.measurement import EvaluationError, Measurement
from evaluators.recovery import returned
from evaluators.survival import measure_survival
from pytest_lmcompose.composition import BASE
from pytest_lmcompose.gates.repeats import side_by_side
from pytest_lmcompose.report.record import Measured, Record, by_metric, clusters_of, runs_of


class _Share(NamedTuple):
    """A kind of share: of which metrics, after a step of which category, and from which states."""

    category: str
    of: Callable[[Measured], bool]
    states: Callable[[str, str, str], tuple[str, ...]]
    """Of the ids before the step, after it and at the end, those that `compute` takes."""
    compute: Callable[..., Measurement]


KINDS = {
    "survival": _Share(
        "edit", lambda m: m["metric"].startswith("edit_"), lambda _, after, end: (after, end), measure_survival
    ),
    "returned": _Share(
        "unlearn",
        lambda m: m["metric"].startswith("accuracy/") and not m["higher_is_better"],
        lambda before, after, end: (before, after, end),
        returned,
    ),
}


def shares(measured: Mapping[str, Record]) -> dict[str, list[dict[str, Any]]]:
    """Return the shares of every kind, from the records of measured compositions by id.

    A share that is not known is null, and its note says why.
    """
    return {
        name: [entry for record in measured.values() for entry in _of(kind, record, measured)]
        for name, kind in KINDS.items()
    }


def _of(kind: _Share, record: Record, measured: Mapping[str, Record]) -> list[dict[str, Any]]:
    ids = [BASE, *("+".join(record["requested"][:k]) for k in range(1, len(record["requested"]) + 1))]
    found = []
    for number, step in enumerate(record["steps"][: len(ids) - 2]):  # after the last step all of it is there
        states = kind.states(ids[number], ids[number + 1], record["id"])
        if step["category"] != kind.category or any(state not in measured for state in states):
            continue
        tables = [by_metric(measured[state]) for state in states]
        for name, end in tables[-1].items():
            if kind.of(end) and all(name in table for table in tables):
                entry = {"composition": record["id"], "step": step["id"], "prefix": ids[number + 1], "metric": name}
                found.append(entry | _share(kind, [table[name] for table in tables]))
    return found


def _share(kind: _Share, states: Sequence[Measured]) -> dict[str, Any]:
    unknown = {"value": None, "stderr": None, "n": states[-1]["n"]}
    if any(run["value"] is None for state in states for run in runs_of(state)):
        return {**unknown, "note": "not finite in some state"}
    try:
        share = kind.compute(*map(_joined, states))
    except EvaluationError as error:
        return {**unknown, "note": str(error)}
    return {"value": share.value, "stderr": share.stderr, "n": share.n, "note": share.note}


def _joined(measured: Measured) -> Measurement:
    """Return a measurement with the samples of its repeats in one row.

    Those of repeats that may have asked the same are averaged: no fewer are left to be independent
    than there are, whether they did or not.
    """
    runs = runs_of(measured)
    rows = [[float(x) for x in run["samples"]] for run in runs]
    groups = [clusters_of(run) for run in runs]
    if len({(len(row), clusters) for row, clusters in zip(rows, groups, strict=True)}) == 1:
        samples = tuple(rows[0] if len(rows) == 1 else (math.fsum(row) / len(row) for row in zip(*rows, strict=True)))
        clusters = groups[0]
    else:
        samples = tuple(x for row in rows for x in row)
        clusters = side_by_side([(len(row), group) for row, group in zip(rows, groups, strict=True)])
    return Measurement(
        measured["metric"],
        measured["value"],
        measured["stderr"],
        len(samples),
        measured["higher_is_better"],
        samples,
        clusters=clusters,
    )
