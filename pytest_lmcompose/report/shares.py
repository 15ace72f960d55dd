"""Survival of edits and return of unlearned knowledge, from the results of a run.

Both need the intermediate states of a composition to be measured in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from evaluators.measurement import EvaluationError, Measurement
from evaluators.metrics import find_metric
from evaluators.recovery import returned
from evaluators.survival import measure_survival
from interventions.categories import categories
from pytest_lmcompose.composition import BASE
from pytest_lmcompose.gate.repeats import side_by_side
from pytest_lmcompose.results import CompositionResult, Measured, Share


class _Share(NamedTuple):
    """A kind of share: the states it needs and how to compute it."""

    removes: bool
    states: Callable[[str, str, str], tuple[str, ...]]
    """From the ids before the step, after it and at the end, selects the arguments of `compute`."""
    compute: Callable[..., Measurement]

    def of(self, category: str, measured: Measured) -> bool:
        """Say whether steps of a category aim at a metric in this way."""
        about = find_metric(measured.metric, higher_is_better=measured.higher_is_better)
        return category in about.targeted_by and measured.higher_is_better != self.removes


KINDS = {
    "survival": _Share(False, lambda _, after, end: (after, end), measure_survival),
    "returned": _Share(True, lambda before, after, end: (before, after, end), returned),
}


def shares(measured: Mapping[str, CompositionResult]) -> dict[str, tuple[Share, ...]]:
    """Return the shares of every kind, from the records of measured compositions by id.

    A share that is not known is null, and its note says why.
    """
    promising = [category for category in categories().values() if category.promises]
    found = {}
    for name, kind in KINDS.items():
        of = {category.name for category in promising if category.removes == kind.removes}
        found[name] = tuple(share for record in measured.values() for share in _of(kind, of, record, measured))
    return found


def _of(
    kind: _Share, promising: Collection[str], record: CompositionResult, measured: Mapping[str, CompositionResult]
) -> Iterator[Share]:
    ids = [BASE, *("+".join(record.requested[:k]) for k in range(1, len(record.requested) + 1))]
    for number, step in enumerate(record.steps[: len(ids) - 2]):  # not the last step: nothing follows it
        states = kind.states(ids[number], ids[number + 1], record.id)
        if step.category not in promising or any(state not in measured for state in states):
            continue
        tables = [measured[state].by_metric for state in states]
        for name, end in tables[-1].items():
            if kind.of(step.category, end) and all(name in table for table in tables):
                value, error, n, note = _share(kind, [table[name] for table in tables])
                yield Share(record.id, step.id, ids[number + 1], name, value, error, n, note)


def _share(kind: _Share, states: Sequence[Measured]) -> tuple[float | None, float | None, int, str]:
    """Return value, standard error, number of samples and note of a share."""
    if any(run.value is None for state in states for run in state.runs):
        return None, None, states[-1].n, "not finite in some state"
    try:
        share = kind.compute(*map(_joined, states))
    except EvaluationError as error:
        return None, None, states[-1].n, str(error)
    value = share.value if math.isfinite(share.value) else None
    return value, share.stderr, share.n, share.note


def _joined(measured: Measured) -> Measurement:
    """Return a measurement with the samples of all repeats.

    Repeats that may share their samples are averaged sample by sample; others are concatenated.
    """
    found = [measured.measurement(run) for run in measured.runs]
    if len({(len(run.samples), run.clusters) for run in found}) == 1:
        rows = zip(*(run.samples for run in found), strict=True)
        samples = found[0].samples if len(found) == 1 else tuple(math.fsum(row) / len(row) for row in rows)
        clusters = found[0].clusters
    else:
        samples = tuple(sample for run in found for sample in run.samples)
        clusters = side_by_side([(len(run.samples), run.clusters) for run in found])
    whole = measured.measurement()
    return Measurement(
        whole.metric, whole.value, whole.stderr, len(samples), whole.higher_is_better, samples, clusters=clusters
    )
