"""Try compositions one after another in a warm process: each is built, measured and judged as in a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from evaluators.measurement import EvaluationError
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.costs import duration
from pytest_lmcompose.errors import BuildError, RecipeError
from pytest_lmcompose.gate.evaluator import GateEvaluator
from pytest_lmcompose.gate.thresholds import compares_with
from pytest_lmcompose.results import CompositionResult
from pytest_lmcompose.run import Run

Say = Callable[[str], None]


class Deadline:
    """The time that a search may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.seconds - self.spent)

    def __str__(self) -> str:
        return duration(self.left)


class _StopTrial(Exception):
    """Ends a trial that has shown enough."""

    def __init__(self, record: CompositionResult) -> None:
        super().__init__()
        self.record = record


class Judged(NamedTuple):
    """A composition that was judged."""

    record: CompositionResult
    seconds: float
    stopped: bool
    """Whether only some of its gates were judged."""


class Bench:
    """Builds, measures and judges compositions; states of common prefixes are built once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.deadline = Deadline(0.0)
        """That of the present search."""
        self._took: dict[str, float] = {}
        """Seconds of each step and method in this process; of an evaluation under an empty name."""
        self._built: set[Composition] = set()
        """States that were built in this process."""

    def can_start(self, composition: Composition) -> bool:
        """Return whether the recipe allows a composition."""
        try:
            self.run.read(composition.id)
        except RecipeError:
            return False
        return True

    def expected(self, composition: Composition) -> float:
        """Return the expected seconds of a trial; states that were built here are in the cache, if there is one."""
        known = self._built if self.run.cache is not None else ()
        new = (prefix.steps[-1] for prefix in composition.prefixes() if prefix not in known)
        return sum(self._expected(step) for step in (*new, None))

    def _expected(self, step: Step | None) -> float:
        names = ("",) if step is None else (str(step), step.method)
        known = (self._took[name] for name in names if name in self._took)
        return next(known, self.run.costs.expected(step))

    def judge(
        self,
        composition: Composition,
        asked: Composition,
        first: Collection[str] = (),
        stops: Callable[[CompositionResult], bool] | None = None,
    ) -> Judged:
        """Build, measure and judge a composition; a step that fails is part of the result.

        The metrics `first` are measured first, and `stops` says whether the gates judged so far are enough. Keeps the
        states of single steps of `asked` in memory, which others start from. Raises EvaluationError if the base model
        cannot be measured.
        """
        start, run, stopped = time.monotonic(), self.run, None
        result, evaluator = run.result(composition), GateEvaluator(run)

        def look(record: CompositionResult) -> None:
            if record.gates and stops is not None and stops(record):
                raise _StopTrial(record)

        run.first = first
        try:
            evaluator.gates(composition, look)  # as in a run of this composition alone
        except _StopTrial as stop:
            stopped = stop.record
            del run.results[composition], run.touched[composition]
        except (BuildError, EvaluationError):
            if result.error is None:
                raise
        finally:
            built = [s for c in (composition, *compares_with(run.rules, composition)) for s in c.prefixes()]
            run.release(s for s in built if len(s.steps) > 1 or s.steps[0] not in asked.steps)
        record = stopped or result.record()
        for step, done in zip(composition.steps, record.steps, strict=False):
            self._took[str(step)] = self._took[step.method] = done.seconds
        self._built.update(composition.prefixes())
        if record.evaluate_seconds is not None:
            self._took[""] = record.evaluate_seconds
        return Judged(record, time.monotonic() - start, stopped is not None)
