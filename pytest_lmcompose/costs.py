"""Estimate the cost of steps and evaluations from earlier runs in the cache. Imports no torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from pytest_lmcompose.composition import Step
from pytest_lmcompose.texts import first_names

_LEAST = 1e-3
"""Seconds; no step is free, so that work is always divided."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class StepCost(NamedTuple):
    """The measured cost of one application of a step."""

    step: str
    """The step with its own settings, as in a composition's id."""
    method: str
    seconds: float
    bytes: int
    """Size of the tensors that it changed."""


@dataclass(frozen=True)
class Costs:
    """Medians over earlier runs: of the same step if available, otherwise of its method."""

    steps: dict[str, tuple[float, int]] = field(default_factory=dict)
    methods: dict[str, tuple[float, int]] = field(default_factory=dict)
    evaluation: float | None = None
    """Seconds to measure one state; None if unknown."""

    @classmethod
    def of(cls, steps: Iterable[StepCost], evaluations: Sequence[float]) -> Costs:
        """Return the medians of measured costs."""
        by_step: defaultdict[str, list[StepCost]] = defaultdict(list)
        by_method: defaultdict[str, list[StepCost]] = defaultdict(list)
        for cost in steps:
            by_step[cost.step].append(cost)
            by_method[cost.method].append(cost)
        return cls(
            {name: _medians(costs) for name, costs in by_step.items()},
            {name: _medians(costs) for name, costs in by_method.items()},
            statistics.median(evaluations) if evaluations else None,
        )

    def seconds(self, step: Step) -> float | None:
        """Return the expected seconds of `step`, None if unknown."""
        found = self._of(step)
        return None if found is None else found[0]

    def expected(self, step: Step | None) -> float:
        """Return the expected seconds of `step`, or of an evaluation for None; a typical value if unknown."""
        known = self.evaluation if step is None else self.seconds(step)
        return max(_LEAST, self._usual if known is None else known)

    @cached_property
    def _usual(self) -> float:
        known = [seconds for seconds, _ in self.methods.values()]
        return statistics.median(known) if known else self.evaluation or 1.0

    def bytes(self, step: Step) -> int | None:
        """Return the expected size of the tensors that `step` changes, None if unknown."""
        found = self._of(step)
        return None if found is None else found[1]

    def lines(self, seconds: float, peak_bytes: int, steps: Sequence[Step]) -> Iterator[str]:
        """Yield lines with the totals of a plan over `steps`, and the steps of unknown cost."""
        unknown = sorted({str(step) for step in steps if self._of(step) is None})
        if len(unknown) < len({*map(str, steps)}) or self.evaluation is not None:
            about = "at least" if unknown or self.evaluation is None else "about"
            most = "at least" if unknown else "up to"
            yield (
                f"{about} {duration(seconds)} in one process"
                f"{'' if self.evaluation is not None else ', evaluation not counted'}; "
                f"snapshots take {most} {size(peak_bytes)} of host memory"
            )
        if unknown:
            yield f"no cached run shows the cost of {first_names(unknown, 5)}"

    def _of(self, step: Step) -> tuple[float, int] | None:
        return self.steps.get(str(step)) or self.methods.get(step.method)


SECONDS = {"s": 1, "min": 60, "h": 3600}
"""Seconds of the units in which users give times."""


def duration(seconds: float) -> str:
    """Return seconds as text: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Return a number of bytes as text, such as 1.5 GiB."""
    for unit in UNITS:
        if count < 1024 or unit == UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == UNITS[0] else f"{count:.1f} {unit}"


def _medians(costs: Sequence[StepCost]) -> tuple[float, int]:
    return statistics.median(c.seconds for c in costs), round(statistics.median(c.bytes for c in costs))
