"""How far a gate is from its limit. Guides searches; verdicts are those of `judge`. Imports no torch."""

from __future__ import annotations

import math

from pytest_lmcompose.gate.thresholds import LOSS, LOSS_ERRORS, LOSS_PERCENT, PROMISED
from pytest_lmcompose.results import CompositionResult, Gate

WORST = -10.0
"""The margin of a gate that has no value, or whose value is far beyond its limit."""
_LEAST = 1e-6
"""A failed gate is at least this far below its limit."""


def margins(record: CompositionResult) -> list[tuple[Gate, float]]:
    """Return each gate with its distance from its limit, as a share of the limit: negative if it failed.

    From -10 to 1; below -1, distances count by their logarithm. A metric that was not measured or is not finite is at
    -10.
    """
    higher = {measured.metric: measured.higher_is_better for measured in record.measurements}
    return [(gate, _margin(gate, higher.get(gate.metric, True))) for gate in record.gates]


def _margin(gate: Gate, higher: bool) -> float:
    share = min(1.0, _share(gate, higher))
    if share < -1:
        share = max(WORST, -1 - math.log(-share))
    return max(share, 0.0) if gate.passed else min(share, -_LEAST)


def _share(gate: Gate, higher: bool) -> float:
    if gate.value is None or gate.threshold is None:
        return -math.inf
    if gate.paired is not None:
        return gate.paired.p_holm / gate.threshold - 1
    if gate.evidence is not None:
        upper = gate.evidence.upper
        return -1.0 if upper is None else 1 - upper / (gate.evidence.margin or 1.0)
    limit, lower = limit_of(gate, higher)
    distance = gate.value - limit if lower else limit - gate.value
    return distance / (abs(limit) or 1.0)


def limit_of(gate: Gate, higher: bool) -> tuple[float, bool]:
    """Return the limit of a value, and whether it is a lower one."""
    kind, threshold, base = gate.gate, gate.threshold or 0.0, gate.base_value
    if kind == PROMISED or base is None:
        return threshold, higher if kind == PROMISED else kind == "min"
    if "ratio" in kind:
        return threshold * base, kind.startswith("min")
    lower = higher if kind.startswith(LOSS) else kind == "max_drop"
    if kind == LOSS_ERRORS:  # the error is not known here
        threshold = 0.0
    elif kind == LOSS_PERCENT:
        threshold *= abs(base) / 100
    return (base - threshold if lower else base + threshold), lower
