"""Verdicts and messages of gates that compare samples pair by pair. Imports no torch."""

from __future__ import annotations

import math

from pytest_lmcompose.gate.paired import BASE_MODEL, describe
from pytest_lmcompose.gate.thresholds import NO_DROP
from pytest_lmcompose.results import Evidence, Gate, Paired, replace


def paired_gate(composition: str, gate: Gate, paired: Paired, reachable: float) -> Gate:
    """Return a paired gate with its final verdict and message.

    `reachable` is the smallest p that the samples can reach after Holm's correction: a gate that can never fail does.
    """
    assert gate.threshold is not None and gate.value is not None and gate.base_value is not None
    label = f"{composition}  {gate.metric} = {shown_number(gate.value)}"
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
    return replace(gate, passed=passed, message=message, paired=paired)


def evidence_gate(composition: str, gate: Gate, evidence: Evidence) -> Gate:
    """Return a gate of `not_worse_than` with its verdict and message."""
    assert gate.value is not None and gate.base_value is not None and evidence.loss is not None
    upper = math.inf if evidence.upper is None else evidence.upper
    passed = upper < evidence.margin
    label, margin = f"{composition}  {gate.metric} = {shown_number(gate.value)}", shown_number(evidence.margin)
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
    return replace(gate, passed=passed, message=message, evidence=evidence)


def shown_number(value: float) -> str:
    """Return a number as messages show it."""
    return f"{value:.6g}"
