"""Tune one step's settings: the front of what is cheap against what keeps its promises."""

from __future__ import annotations

import itertools

from interventions.names import near_names
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.search.bench import Bench, Deadline, Say
from pytest_lmcompose.search.records import Trial
from pytest_lmcompose.search.searcher import Searcher
from pytest_lmcompose.search.study import Direction

_ALL = 48
"""A space with so many points at most is tried as a whole."""
_WORST = 1e9
"""Cost of a step that failed."""


class SearchError(Exception):
    """Nothing can be searched; the message says why."""


class Tuner(Searcher):
    """The search over the settings of the last step of a composition."""

    def __init__(self, bench: Bench, composition: Composition, deadline: Deadline, say: Say, cost: str) -> None:
        """Judge `composition`; `cost` is the metric to weigh against the least margin of the gates on others.

        Raises SearchError if it is not measured.
        """
        self.cost = cost
        super().__init__(bench, composition, deadline, say, len(composition.steps) - 1, cost)

    @property
    def lower_is_cheaper(self) -> bool:
        """The direction of the cost."""
        return not self.record.by_metric[self.cost].higher_is_better

    def directions(self) -> list[Direction]:
        """Return those of the cost and the margin."""
        known = list(self.record.by_metric)
        if self.cost not in known:
            problem = self.record.error or f"{self.cost} is not measured.{near_names(self.cost, known)}"
            raise SearchError(f"{self.asked}: {problem} Measured: {', '.join(known) or 'nothing'}.")
        return ["minimize" if self.lower_is_cheaper else "maximize", "maximize"]

    def values(self, trial: Trial) -> list[float]:
        """Return the cost, and the least margin of the gates on other metrics."""
        return [trial.metrics.get(self.cost, _WORST if self.lower_is_cheaper else -_WORST), trial.margin]

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Return whether others beat the trial, then the distance."""
        return trial not in self.front(), trial.distance

    def search(self) -> None:
        """Try settings until the budget is spent."""
        space = self.space
        if space.points <= _ALL:
            points = sorted(itertools.product(*(range(len(dial.options)) for dial in space.dials)), key=space.distance)
        else:
            points = sorted((point for _, point in space.neighbours(space.asked)), key=space.distance)
        for point in points:
            self.attempt(point)
        if space.points > _ALL:
            for _ in self.proposals():
                pass

    def front(self) -> list[Trial]:
        """Return the trials that no other one beats in both cost and margin, the cheapest first."""
        sign = 1 if self.lower_is_cheaper else -1
        found: list[Trial] = []
        measured = [trial for trial in self.study.known.values() if trial.error is None and self.cost in trial.metrics]
        for trial in sorted(measured, key=lambda t: (sign * t.metrics[self.cost], -t.margin, t.distance)):
            if not found or trial.margin > found[-1].margin:
                found.append(trial)
        return found
