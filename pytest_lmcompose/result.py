"""What is known about one composition of a run. No torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from evaluators.measurement import Measurement
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.gates.gate import Verdict
from pytest_lmcompose.gates.repeats import Repeat

if TYPE_CHECKING:
    from pytest_lmcompose.steps import StepRecord


@dataclasses.dataclass
class Result:
    """What is known so far about one composition."""

    composition: Composition
    steps: tuple[StepRecord, ...] = ()
    state_hash: str | None = None
    measurements: tuple[Measurement, ...] | None = None
    """Over all repeats."""
    repeats: tuple[Repeat, ...] = ()
    """Behind the measurements; `steps` and `state_hash` are the first one's."""
    evaluate_seconds: float | None = None
    data: dict[str, str] | None = None
    """Hashes of what was asked; see `asked`."""
    gates: tuple[Verdict, ...] | None = None
    error: str | None = None
    interrupted: bool = False

    @property
    def status(self) -> str:
        """Say how far it came: failed, interrupted, measured, built or begun."""
        if self.error is not None:
            return "interrupted" if self.interrupted else "failed"
        if self.measurements is not None:
            return "measured"
        return "built" if self.state_hash is not None else "begun"

    def fail(self, error: BaseException) -> None:
        """Keep what went wrong."""
        self.error = f"{type(error).__name__}: {error}".removesuffix(": ")
        self.interrupted = isinstance(error, KeyboardInterrupt)
