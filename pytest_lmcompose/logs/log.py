"""The samples of an evaluation, whatever tool wrote them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class LogError(Exception):
    """A log that cannot be read, or two that cannot be compared; one line that names the file."""


@dataclass
class Metric:
    """One metric of one task."""

    name: str
    """As `task/metric`."""
    higher_is_better: bool = True
    values: dict[str, list[float]] = field(default_factory=dict)
    """Values by the id of the sample; several if it was asked several times."""

    def add(self, sample: str, value: float) -> None:
        """Add the value of a sample."""
        self.values.setdefault(sample, []).append(value)


@dataclass(frozen=True)
class Log:
    """What one evaluation of one model measured."""

    path: str
    tool: str
    """lm-evaluation-harness, Inspect or LightEval."""
    metrics: Mapping[str, Metric]


def last_run(folder: Path, files: str, dated: re.Pattern[str]) -> list[Path]:
    """Return the files of the last run in a folder, or below it: those that match `dated` with the latest `date`."""
    found = [(match["date"], file) for file in folder.rglob(files) if (match := dated.fullmatch(file.name))]
    last = max((date for date, _ in found), default="")
    return sorted(file for date, file in found if date == last)


def number(value: object) -> float | None:
    """Return a score as a number: right or wrong as 1 or 0; None if it is neither."""
    if isinstance(value, bool | int | float):
        return float(value)
    return _GRADES.get(value) if isinstance(value, str) else None


_GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""Inspect's grades: correct, incorrect, partially correct, no answer."""
