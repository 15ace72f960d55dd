"""What repair and tuning share: a composition, its space and study, and a budget."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_lmcompose.cache.address import address
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import duration
from pytest_lmcompose.results import CompositionResult
from pytest_lmcompose.search.bench import Bench, Deadline, Judged, Say
from pytest_lmcompose.search.records import Trial, trial_of, verdict
from pytest_lmcompose.search.space import Point, space_of
from pytest_lmcompose.search.study import Direction, Study
from pytest_lmcompose.texts import counted

STUDIES = "searches"
"""Folder in the cache."""
_LEAST = 1e-9
"""Differences of violations below this are rounding."""
_IDLE = 20
"""Refused points in a row, after which a search ends."""


class Searcher:
    """Tries points near a composition, each once; earlier calls count."""

    def __init__(
        self,
        bench: Bench,
        composition: Composition,
        deadline: Deadline,
        say: Say,
        only: int | None = None,
        cost: str | None = None,
    ) -> None:
        """Judge `composition`; search all of it, or the settings of its step `only`. Gates on `cost` do not count."""
        self.bench, self.asked, self.deadline, self._say, self._cost = bench, composition, deadline, say, cost
        bench.deadline = deadline
        run = bench.run
        judged = bench.judge(composition, composition)
        self.record = judged.record
        directions = self.directions()
        changed = {place: step.changed for place, step in enumerate(self.record.steps)}
        self.space = space_of(run.recipe, composition, changed, only)
        self.refused: set[Point] = set()
        name = address(
            asked=[run.address(composition, number) for number in range(len(run.seeds))],
            rules=run.rules,
            dials=self.space.dials,
            directions=directions,
            cost=cost,
        )
        file = None if run.cache is None else run.cache.folder / STUDIES / f"{name}.journal"
        self.study = Study(self.space, file, directions, run.options.seed, say)
        before = len(self.study.known)
        self.first = self.study.known.get(self.space.asked) or self._add(self.space.asked, judged)
        self._say(f"{composition}: {verdict(self.first)}  {duration(judged.seconds)}")
        if before:
            self._say(f"going on after {counted(before, 'trial')} of earlier calls")

    def directions(self) -> list[Direction]:
        """Return the directions of `values`, `minimize` or `maximize`."""
        raise NotImplementedError

    def values(self, trial: Trial) -> list[float]:
        """Return what to optimise."""
        raise NotImplementedError

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Return what is small for the best trials."""
        raise NotImplementedError

    def constraints(self, trial: Trial) -> dict[str, float]:
        """Return what should be at most 0."""
        return {}

    def hopeless(self, composition: Composition) -> bool:
        """Return whether a composition is not worth a trial."""
        return False

    def enough(self) -> float | None:
        """Return the violation that stops a trial before all of it is measured; None: nothing does."""
        return None

    def _stops(self, record: CompositionResult) -> bool:
        """Return whether what a trial has measured so far is enough to know that it is no better."""
        enough = self.enough()
        return enough is not None and trial_of(record, (), 0, 0.0).violation > max(enough - _LEAST, 0.0)

    def attempt(self, point: Point) -> Trial | None:
        """Return the trial of a point; None if it is refused.

        That is, if it cannot start, is hopeless, or is expected to take longer than is left.
        """
        if (known := self.study.known.get(point)) is not None:
            return known
        composition = self.space.composition(point)
        if (
            composition is None
            or not self.bench.can_start(composition)
            or self.hopeless(composition)
            or self.bench.expected(composition) > self.deadline.left
        ):
            self.refused.add(point)
            return None
        trial = self._add(point, self.bench.judge(composition, self.asked, self.record.failed_metrics, self._stops))
        number = len(self.study.known) - 1
        self._say(f"{number:3}  {trial.composition}  {verdict(trial)}  {duration(trial.seconds)}, {self.deadline} left")
        return trial

    def _add(self, point: Point, found: Judged) -> Trial:
        record, seconds, stopped = found
        trial = trial_of(record, self.space.words(point), self.space.distance(point), seconds, self._cost)
        if stopped:
            trial = trial.as_far_as(self.first, record)
        self.study.add(point, trial, self.values(trial), self.constraints(trial))
        return trial

    def proposals(self) -> Iterator[tuple[Point, Trial]]:
        """Yield trials that Optuna proposes, until the budget is spent or nothing new can be tried."""
        idle = 0
        while self.deadline.left and idle < _IDLE:
            point = self.study.propose(self.refused) or self._near_best()
            if point is None:
                return
            trial = self.attempt(point)
            idle = idle + 1 if trial is None else 0
            if trial is not None:
                yield point, trial

    def _near_best(self) -> Point | None:
        """Return a point beside the best trial that has any which was not tried."""
        known = self.study.known
        for point in sorted(known, key=lambda point: self.rank(known[point])):
            for _, near in self.space.neighbours(point):
                if near not in known and near not in self.refused:
                    return near
        return None
