"""The result of one composition while the run goes on. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.gate.repeats import find
from pytest_lmcompose.results import CompositionResult, Export, Gate, Measured, RepeatInfo, Step

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.gate.repeats import Repeat
    from pytest_lmcompose.steps import StepRecord


@dataclasses.dataclass
class Result:
    """Collects results while a composition is built, measured and gated; `record` returns them for the report."""

    composition: Composition
    steps: tuple[StepRecord, ...] = ()
    state_hash: str | None = None
    measurements: tuple[Measurement, ...] | None = None
    """Means over all repeats."""
    repeats: tuple[Repeat, ...] = ()
    """The single repeats; `steps` and `state_hash` come from the first one."""
    evaluate_seconds: float | None = None
    data: dict[str, str] | None = None
    """Hashes of the evaluation data."""
    gates: tuple[Gate, ...] | None = None
    export: Export | None = None
    error: str | None = None
    interrupted: bool = False

    def fail(self, error: BaseException) -> None:
        """Record an error."""
        self.error = f"{type(error).__name__}: {error}".removesuffix(": ")
        self.interrupted = isinstance(error, KeyboardInterrupt)

    def record(self) -> CompositionResult:
        """Return the results so far."""
        several = self.repeats if len(self.repeats) > 1 else ()
        status = "built" if self.state_hash is not None else "begun"
        if self.error is not None:
            status = "interrupted" if self.interrupted else "failed"
        elif self.measurements is not None:
            status = "measured"
        return CompositionResult(
            self.composition.id,
            tuple(map(str, self.composition.steps)),
            tuple(str(step.step) for step in self.steps),
            status,  # type: ignore[arg-type]
            self.error,
            self.state_hash,
            tuple(map(_step, self.steps)),
            self.evaluate_seconds,
            tuple(
                Measured.of(m, [(r.seed, run) for r in several if (run := find(r.measurements, m.metric)) is not None])
                for m in self.measurements or ()
            ),
            self.gates or (),
            self.data,
            tuple(RepeatInfo(r.seed, r.state_hash, r.evaluate_seconds) for r in several),
            self.export,
        )


def _step(step: StepRecord) -> Step:
    from interventions.registry import category_of

    report = step.report
    return Step(
        str(step.step),
        report.method,
        category_of(report.method),
        report.settings,
        step.seed,
        report.seconds,
        report.peak_memory_bytes,
        len(report.changed),
        tuple(report.changed),
        report.details,
        tuple(report.warnings),
        dict(report.promises),
    )
