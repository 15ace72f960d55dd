"""Results of searches as frozen, typed records. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from pytest_lmcompose.costs import duration
from pytest_lmcompose.gate.margin import WORST, margins
from pytest_lmcompose.results import Base, CompositionResult, Fix, Number, Report, Seconds, Whole, replace
from pytest_lmcompose.texts import counted


class Trial(Base, frozen=True):
    """One composition that was built, measured and judged."""

    composition: str
    changes: tuple[str, ...]
    distance: Annotated[Whole, Meta(description="from what was asked for")]
    gates: Whole
    failed: Annotated[dict[str, float], Meta(description="failed gates with their margins, the worst first")]
    margin: Annotated[float, Meta(description="the least of all gates, as a share of the limit; negative: failed")]
    bits: Annotated[Number, Meta(description="of a weight, with scales and zero points; null: not measured")]
    build_seconds: Annotated[Seconds, Meta(description="of all steps")]
    seconds: Annotated[Seconds, Meta(description="that the trial took")]
    metrics: dict[str, float]
    error: str | None = None
    stopped: Annotated[bool, Meta(description="at red gates; those that were not judged count as asked for")] = False

    @property
    def green(self) -> bool:
        """Whether all gates passed."""
        return self.error is None and not self.failed and self.gates > 0

    @property
    def violations(self) -> dict[str, float]:
        """How far the failed gates are from their limits."""
        return {gate: -margin for gate, margin in self.failed.items()} if self.error is None else {"error": -WORST}

    @property
    def violation(self) -> float:
        """The sum of the violations; 0: green."""
        return sum(self.violations.values())

    def as_far_as(self, asked: Trial, record: CompositionResult) -> Trial:
        """Return the trial, stopped after the gates of `record`; the others come last, and fail as in `asked`."""
        judged = {f"{gate.metric} {gate.gate}" for gate in record.gates}
        others = {gate: margin for gate, margin in asked.failed.items() if gate not in judged}
        failed = {**self.failed, **others}
        return replace(self, failed=failed, margin=min(failed.values()), stopped=True)


class Repair(Base, frozen=True):
    """The search for a repair of one composition."""

    composition: str
    asked: Trial
    best: Annotated[Trial, Meta(description="the repair, or what comes nearest")]
    repaired: bool
    command: Annotated[str, Meta(description="runs the best composition")]
    notes: tuple[str, ...]
    trials: tuple[Trial, ...]
    seconds: Seconds


class Repairs(Base, frozen=True):
    """The file that `lmcompose repair --json` writes."""

    kind: Literal["repair"]
    version: Literal[1]
    budget: Annotated[Seconds, Meta(description="for each composition")]
    repairs: tuple[Repair, ...]


class Tuning(Base, frozen=True):
    """The file that `lmcompose tune --json` writes."""

    kind: Literal["tune"]
    version: Literal[1]
    composition: str
    cost: Annotated[str, Meta(description="the metric on one side of the front; on the other is the least margin")]
    lower_is_cheaper: bool
    asked: Trial
    front: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    budget: Seconds
    seconds: Seconds


def trial_of(
    record: CompositionResult, changes: tuple[str, ...], distance: int, seconds: float, cost: str | None = None
) -> Trial:
    """Return the trial of a judged composition; gates on the metric `cost` do not count."""
    judged = [(gate, margin) for gate, margin in margins(record) if gate.metric != cost]
    failed: dict[str, float] = {}
    for gate, margin in sorted(judged, key=lambda pair: pair[1]):
        if not gate.passed:  # of several references, the worst
            failed.setdefault(f"{gate.metric} {gate.gate}", margin)
    metrics = {m.metric: m.value for m in record.measurements if m.value is not None}
    bits = metrics.get("average_bits")
    error = record.error if record.error is not None or judged else "no threshold applies to it"
    return Trial(
        composition=record.id,
        changes=changes,
        distance=distance,
        gates=len(judged),
        failed=failed,
        margin=min((margin for _, margin in judged), default=WORST) if error is None else WORST,
        bits=None if bits is None else bits + metrics.get("overhead_bits", 0.0),
        build_seconds=sum(step.seconds for step in record.steps),
        seconds=seconds,
        metrics=metrics,
        error=error,
    )


def verdict(trial: Trial) -> str:
    """Return the verdict of a trial in words."""
    if trial.error is not None:
        return f"failed: {trial.error}"
    if trial.green:
        return f"green, least margin {trial.margin:+.3f}"
    worst, margin = next(iter(trial.failed.items()))
    if trial.stopped:
        return f"red, stopped after {counted(trial.gates, 'gate')}, worst {worst} {margin:+.3f}"
    return f"red, {len(trial.failed)} of {counted(trial.gates, 'gate')}, worst {worst} {margin:+.3f}"


def extra_cost(found: Repair) -> str:
    """Return what the best composition costs, beside what was asked for."""
    best, asked = found.best, found.asked
    return (
        f"{_beside('bits a weight', best.bits, asked.bits)}, "
        f"{_beside('s to build', best.build_seconds, asked.build_seconds)}"
    )


def _beside(unit: str, now: float | None, before: float | None) -> str:
    if now is None or before is None:
        return f"unknown {unit}"
    return f"{now:.3g} {unit}" + (f" instead of {before:.3g}" if f"{now:.3g}" != f"{before:.3g}" else " as before")


def fix_of(found: Repair) -> Fix:
    """Return what a search found, for a report."""
    best = found.best
    if not found.repaired:
        searched = f"{counted(len(found.trials), 'trial')}, {duration(found.seconds)}"
        note = f"lmcompose repair found none ({searched}); nearest: {best.composition}, {verdict(best)}"
        return Fix(found.composition, None, note)
    if best == found.asked:
        return Fix(found.composition, best.composition, "by itself, it passed all gates")
    changes, gates = "; ".join(best.changes), counted(best.gates, "gate")
    return Fix(found.composition, best.composition, f"{changes}: {extra_cost(found)}; tested, {gates} passed")


def with_repairs(report: Report, found: Iterable[Repair]) -> Report:
    """Return a report with what searches found, instead of what earlier ones found for the same compositions."""
    fixes = [*report.repairs, *map(fix_of, found)]
    return replace(report, repairs=tuple({fix.composition: fix for fix in fixes}.values()))
