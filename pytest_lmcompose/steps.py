"""A step that was applied."""

from __future__ import annotations

from dataclasses import dataclass

from interventions.types import StepReport
from pytest_lmcompose.composition import Step


@dataclass(frozen=True)
class StepRecord:
    """A step that was applied, as the report tells it."""

    step: Step
    seed: int
    report: StepReport
