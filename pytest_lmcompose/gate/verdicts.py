"""Verdicts and messages of gates that compare samples pair by pair. Imports no torch."""

from __future__ import annotations

import math

from pytest_lmcompose.gate.paired import BASE_MODEL, describe
from pytest_lmcompose.gate.thresholds import NO_DROP
from pytest_lmcompose.results import Evidence, Gate, Paired, replace
from pytest_lmcompose.texts import first_names

_SHOWN = 5
"""Metrics of a pool that a message names."""


def paired_gate(composition: str, gate: Gate, paired: Paired, reachable: float) -> Gate:
    """Return a paired gate with its final verdict and message.

    `reachable` is the smallest p that the samples can reach after Holm's correction: a gate that can never fail does.
    """
    assert gate.threshold is not None and gate.value is not None and gate.base_value is not None
    label = _label(composition, gate)
    level = f"{NO_DROP} {shown_number(gate.threshold)}"
    if reachable > gate.threshold:
        message = (
            f"{label}: {level} can never fail: with these samples p is at least {reachable:.3g} after Holm's "
            f"correction; use more samples, a higher level or another bound ({paired.test}, n = {paired.n})"
        )
        return replace(gate, passed=False, message=message, paired=paired)
    passed = paired.p_holm > gate.threshold
    before = f"{shown_number(gate.base_value)} of {gate.reference or BASE_MODEL}"
    found = ": no evidence that it is worse" if passed else " is worse"
    message = f"{label}{found} than {before} at {level}: {describe(paired)}"
    return _with_members(replace(gate, passed=passed, message=message, paired=paired))


def evidence_gate(composition: str, gate: Gate, evidence: Evidence) -> Gate:
    """Return a gate of `not_worse_than` with its verdict and message."""
    assert gate.value is not None and gate.base_value is not None and evidence.loss is not None
    upper = math.inf if evidence.upper is None else evidence.upper
    passed = upper < evidence.margin
    label, margin = _label(composition, gate), shown_number(evidence.margin)
    before = f"{shown_number(gate.base_value)} of {gate.reference or BASE_MODEL}"
    units = f" in {evidence.units} groups" if evidence.units < evidence.n else ""
    found = (
        f"loss {shown_number(evidence.loss)}, with {1 - evidence.level:.4g} confidence below {shown_number(upper)}; "
        f"{evidence.test}, n = {evidence.n}{units}"
    )
    if passed:
        message = f"{label} is not worse than {before} by {margin} ({found})"
    elif evidence.loss >= evidence.margin:
        message = f"{label} is worse than {before} by {margin} or more ({found})"
    else:
        needed = "more" if evidence.needed is None else f"about {max(evidence.needed, evidence.units + 1)}"
        what = "groups" if units else "samples"
        message = (
            f"{label} may be worse than {before} by {margin}: too little evidence; a model without any loss needs "
            f"{needed} {what} ({found})"
        )
    return _with_members(replace(gate, passed=passed, message=message, evidence=evidence))


def _label(composition: str, gate: Gate) -> str:
    assert gate.value is not None
    pool = f" over {len(gate.pool)} metrics" if gate.pool else ""
    return f"{composition}  {gate.metric}{pool} = {shown_number(gate.value)}"


def _with_members(gate: Gate) -> Gate:
    """Add to the message of a pool that failed which of its metrics are worse by themselves."""
    if gate.passed or not gate.pool:
        return gate
    worse = [f"{m.metric} (drop {m.drop or 0:.4g}, p = {m.p:.3g})" for m in gate.worse]
    names = f"worse by themselves: {first_names(worse, _SHOWN)}" if worse else "no metric is worse by itself"
    return replace(gate, message=f"{gate.message}; {names}")


def shown_number(value: float) -> str:
    """Return a number as messages show it."""
    return f"{value:.6g}"
