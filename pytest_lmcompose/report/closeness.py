"""Table of how close each composition is to the base model; see `evaluators.closeness` and `evaluators.flips`."""

from __future__ import annotations

from collections.abc import Sequence

from evaluators.metrics import find_metric
from evaluators.registry import FLIPS
from pytest_lmcompose.report.numbers import MISSING, with_error
from pytest_lmcompose.results import CompositionResult

TITLE = "closeness to the base model: divergence on running text, and shares of answers that changed"
_ON_TEXT = ("kl_to_base", "top1_agreement")


def closeness_rows(records: Sequence[CompositionResult]) -> list[list[str]]:
    """Return a header and one row per composition with steps, with standard errors; empty if nothing was measured.

    Flips and churn are those of headline metrics; those of single tasks are among the other measurements.
    """
    changed = [record for record in records if record.requested]
    metrics = [name for name in dict.fromkeys(m.metric for r in changed for m in r.measurements) if _shown(name)]
    if not metrics:
        return []
    rows = [["composition", *metrics]]
    for record in changed:
        known = record.by_metric
        found = [known.get(name) for name in metrics]
        if any(found):
            rows.append([record.id, *(MISSING if m is None else with_error(m.value, m.stderr, " ±") for m in found)])
    return rows


def _shown(metric: str) -> bool:
    kind, _, of = metric.partition("/")
    return metric in _ON_TEXT or (kind in FLIPS and find_metric(of).headline)
