"""The record of an applied step."""

from __future__ import annotations

from dataclasses import dataclass

from interventions.types import StepReport
from pytest_lmcompose.composition import Step


@dataclass(frozen=True)
class StepRecord:
    """A step, its seed and the method's report."""

    step: Step
    seed: int
    report: StepReport
