"""Try compositions one after another in a warm process: each is built, measured and judged as in a run."""

from __future__ import annotations

import time
from collections.abc import Callable

from evaluators.measurement import EvaluationError
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.costs import duration
from pytest_lmcompose.errors import BuildError, RecipeError
from pytest_lmcompose.gate.evaluator import GateEvaluator
from pytest_lmcompose.results import CompositionResult
from pytest_lmcompose.run import Run

Say = Callable[[str], None]


class Budget:
    """The time that a search may take."""

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
        return f"{duration(self.left)} left"


class Bench:
    """Builds, measures and judges compositions; states of common prefixes are built once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._took: dict[str, float] = {}
        """Seconds of each step and method in this process; of an evaluation under an empty name."""

    def can_start(self, composition: Composition) -> bool:
        """Return whether the recipe allows a composition."""
        try:
            self.run.read(composition.id)
        except RecipeError:
            return False
        return True

    def expected(self, composition: Composition) -> float:
        """Return the expected seconds of a trial of which nothing is in the cache."""
        return sum(self._expected(step) for step in (*composition.steps, None))

    def _expected(self, step: Step | None) -> float:
        names = ("",) if step is None else (str(step), step.method)
        known = (self._took[name] for name in names if name in self._took)
        return next(known, self.run.costs.expected(step))

    def judge(self, composition: Composition, asked: Composition) -> tuple[CompositionResult, float]:
        """Return the result of a composition and the seconds it took; a step that fails is part of the result.

        Keeps the states of single steps of `asked` in memory, which others start from. Raises EvaluationError if the
        base model cannot be measured.
        """
        start = time.monotonic()
        result, evaluator = self.run.result(composition), GateEvaluator(self.run)
        try:
            evaluator.gates(composition)  # as in a run of this composition alone
        except (BuildError, EvaluationError):
            if result.error is None:
                raise
        finally:
            built = [s for c in (composition, *evaluator.compared_with(composition)) for s in c.prefixes()]
            self.run.release(s for s in built if len(s.steps) > 1 or s.steps[0] not in asked.steps)
        record = result.record()
        for step, done in zip(composition.steps, record.steps, strict=False):
            self._took[str(step)] = self._took[step.method] = done.seconds
        if record.evaluate_seconds is not None:
            self._took[""] = record.evaluate_seconds
        return record, time.monotonic() - start
