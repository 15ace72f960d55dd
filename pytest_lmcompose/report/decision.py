"""What a reader wants to know first: whether to ship, why, the cheapest fix that is known, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pytest_lmcompose.composition import BASE
from pytest_lmcompose.gate.margin import limit_of, margins
from pytest_lmcompose.gate.thresholds import PROMISED
from pytest_lmcompose.report.composability import change_error
from pytest_lmcompose.report.numbers import number
from pytest_lmcompose.report.view import summarise_gates
from pytest_lmcompose.results import CompositionResult, Fix, Gate, Report
from pytest_lmcompose.texts import counted, first_names

REASONS, FIXES = 5, 3
"""Maximum number of reasons and fixes on the first screen."""
CLOSE = 2.0
"""Standard errors from its limit within which a gate may turn with other samples."""
_NAMED = 12
"""Maximum number of compositions to name."""


class Reason(NamedTuple):
    """Why not to ship a composition."""

    composition: str
    text: str


@dataclass(frozen=True)
class Decision:
    """The answer of a run to whether its compositions can be shipped."""

    state: Literal["passed", "lost", "failed", "not judged"]
    verdict: str
    green: str
    """Which compositions can be shipped although others cannot; empty if none, or all."""
    reasons: tuple[Reason, ...]
    """The worst first."""
    fixes: tuple[Fix, ...]
    sure: tuple[str, ...]


def decide(report: Report) -> Decision:
    """Return the decision that the gates of a run amount to."""
    records = report.compositions
    gates = summarise_gates(records)
    verdict = {"failed": "Do not ship", "not judged": "No verdict"}.get(gates.state, "Ship")
    judged = [record for record in records if record.requested and (record.gates or record.error)]
    green = [record.id for record in judged if _green(record)]
    named = first_names(green, _NAMED)
    reasons = _reasons(records)
    return Decision(
        gates.state,
        f"{verdict}: {gates.summary}",
        f"{len(green)} of {counted(len(judged), 'composition')} passed all gates: {named}" if green and reasons else "",
        tuple(reasons),
        tuple(_fixes(report, list(dict.fromkeys(reason.composition for reason in reasons)))),
        tuple(_certainty(records)),
    )


def _green(record: CompositionResult) -> bool:
    return summarise_gates([record]).state in ("passed", "lost")


def _reasons(records: Sequence[CompositionResult]) -> list[Reason]:
    missing = [Reason(r.id, f"was not measured: {r.error or r.status}") for r in records if not _finished(r)]
    failed = [
        (margin, Reason(r.id, in_words(r, gate))) for r in records for gate, margin in margins(r) if not gate.passed
    ]
    return missing + [reason for _, reason in sorted(failed, key=lambda pair: pair[0])]


def _finished(record: CompositionResult) -> bool:
    return record.status not in ("failed", "interrupted")


def in_words(record: CompositionResult, gate: Gate) -> str:
    """Return what a failed gate says in plain words."""
    measured, reference = record.by_metric.get(gate.metric), gate.reference or "the base model"
    if measured is None or gate.value is None or gate.threshold is None:
        return gate.message.removeprefix(record.id).strip()
    value = f"{gate.metric} is {number(gate.value)}"
    before = "" if gate.base_value is None else f"; {reference} has {number(gate.base_value)}"
    if gate.paired is not None:
        return f"{value}{before}: a paired test finds it worse (p = {gate.paired.p_holm:.2g})"
    if gate.evidence is not None:
        upper = "any" if gate.evidence.upper is None else number(gate.evidence.upper)
        return f"{value}{before}: the loss may be {upper}, and {number(gate.evidence.margin)} had to be excluded"
    limit, lower = limit_of(gate, measured.higher_is_better)
    need = f"at least {number(limit)}" if lower else f"at most {number(limit)}"
    return f"{value}, but a step promises {need}" if gate.gate == PROMISED else f"{value}, but must be {need}{before}"


def _fixes(report: Report, failed: Sequence[str]) -> Iterator[Fix]:
    """Yield the cheapest fix that is known for each of the worst compositions; what it is to run where none is."""
    known = {fix.composition: fix for fix in report.repairs}
    green = [record for record in report.compositions if record.requested and _green(record)]
    for name in [name for name in failed if report.by_id[name].requested][:FIXES]:
        yield known.get(name) or _tested_fix(report.by_id[name], green) or _untested_fix(report.by_id[name])


def _tested_fix(record: CompositionResult, green: Sequence[CompositionResult]) -> Fix | None:
    """Return the same steps in another order, or with one more, if this run tested them and all gates passed."""
    for more, text in ((0, "the same steps in another order"), (1, "the same steps and one more")):
        for other in green:
            missing = Counter(record.requested) - Counter(other.requested)
            if not missing and len(other.requested) == len(record.requested) + more:
                return Fix(record.id, other.id, f"{text}; this run tested it, and all gates passed")
    return None


def _untested_fix(record: CompositionResult) -> Fix:
    """Return the step to repeat if a later one broke what its settings promise, otherwise only the command to run."""
    broken = [step.id for step in record.steps[:-1] if record.failed_metrics & set(step.promises or {})]
    if broken:
        return Fix(
            record.id, f"{record.id}+{broken[-1]}", "repeats the step whose promise a later one broke; not tested"
        )
    return Fix(record.id, None, "")


def _certainty(records: Sequence[CompositionResult]) -> Iterator[str]:
    """Yield how far the verdict is from another one."""
    known = {record.id: record for record in records}
    distances = [
        (distance, record.id, gate)
        for record in records
        for gate in record.gates
        if (distance := _distance(record, gate, known)) is not None
    ]
    failed = [found for found in distances if not found[2].passed]
    passed = [found for found in distances if found[2].passed]
    if failed:
        distance, name, gate = max(failed, key=lambda found: found[0])
        yield f"The clearest failure, {gate.metric} of {name}, is {distance:.1f} standard errors beyond its limit."
    if passed:
        distance, name, gate = min(passed, key=lambda found: found[0])
        near = sum(distance < CLOSE for distance, _, _ in passed)
        yield f"The closest pass, {gate.metric} of {name}, is {distance:.1f} standard errors within its limit."
        if near:
            yield (
                f"{near} of {counted(len(passed), 'passed gate')} with a limit: less than {CLOSE:g} standard errors "
                "from it, so other samples might fail."
            )
    blind = [
        g for r in records for g in r.gates if g.passed and g.paired is not None and g.paired.smallest_drop is None
    ]
    tests = [g for r in records for g in r.gates if g.passed and g.paired is not None]
    if tests:
        yield (
            f"{counted(len(tests), 'passed gate')} found no drop, which does not exclude one; "
            f"{len(blind)} of them could not have found any with so few samples."
        )


def _distance(record: CompositionResult, gate: Gate, known: Mapping[str, CompositionResult]) -> float | None:
    """Return how many standard errors a metric is from its limit; None without a limit or an error."""
    measured = record.by_metric.get(gate.metric)
    if measured is None or gate.value is None or gate.threshold is None or gate.paired or gate.evidence:
        return None
    error = measured.stderr
    reference = known.get(gate.reference or BASE)
    if gate.base_value is not None and reference is not None and reference is not record:
        before = reference.by_metric.get(gate.metric)
        error = (None if before is None else change_error(before, measured)) or error
    if not error:
        return None
    return abs(gate.value - limit_of(gate, measured.higher_is_better)[0]) / error
