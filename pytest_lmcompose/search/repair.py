"""Repair a composition: find the change nearest to what was asked for that turns all gates green.

Single changes come first, the nearest first: another order, a repeated step, layers to spare, settings one place on.
Only those are tried that may help: a step that broke others' promises, or what every step must leave alone, becomes
milder, and a step whose promise is broken is repeated or becomes stronger. Changes that helped are put together and
moved on, at once if one helped a lot. At last Optuna proposes (TPE, with the violation of the gates as a constraint).
What is found is simplified: each change is taken back, in whole or by one place, if the gates stay green. Then single
changes that are nearer, and were not tried yet, get their chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from pytest_lmcompose.composition import Step
from pytest_lmcompose.gate.promises import promises
from pytest_lmcompose.search.records import Trial
from pytest_lmcompose.search.searcher import Searcher
from pytest_lmcompose.search.space import Dial, Point
from pytest_lmcompose.search.study import Direction

_FOLLOWED = 2
"""Trials that follow a single change which helped a lot, before the next single change."""
_TOGETHER = 12
"""Trials that put changes together before Optuna proposes."""
_KINDS = ("order", "again", "layers", "setting")


class Repairer(Searcher):
    """The search for a repair of one composition."""

    def directions(self) -> list[Direction]:
        """Return that the distance is to be small."""
        return ["minimize"]

    def values(self, trial: Trial) -> list[float]:
        """Return the distance."""
        return [float(trial.distance)]

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Return the violation, then the distance."""
        return trial.violation, trial.distance

    def constraints(self, trial: Trial) -> dict[str, float]:
        """Return the violation of the gates."""
        return {"gates": trial.violation}

    def search(self) -> None:
        """Search until a repair is found and nothing nearer is left to try, or the budget is spent."""
        if self.first.green:
            return
        found = next((point for point, trial in self._trials() if trial.green), None)
        if found is not None:
            self._simplify(found)
            for point in self._singles():
                if self.space.distance(point) < self.best.distance:
                    self.attempt(point)

    @property
    def best(self) -> Trial:
        """The repair nearest to what was asked for; if there is none yet, the trial that comes nearest to one."""
        return min(self.study.known.values(), key=self.rank)

    def notes(self) -> Iterator[str]:
        """Yield rules for the composition that was asked for that do not judge the best one."""
        best = self.best.composition
        for rule in self.bench.run.rules:
            if rule.bounds and rule.covers(self.asked.id) and not rule.covers(best):
                yield f"the rule {rule.metric} of the thresholds for {rule.composition!r} does not judge {best}"

    def _trials(self) -> Iterator[tuple[Point, Trial]]:
        """Yield trials in the order described above."""
        for point in self._singles():
            if (trial := self.attempt(point)) is not None:
                yield point, trial
                if trial.violation < self.first.violation / 2:
                    yield from self._together(_FOLLOWED)
        yield from self._together(_TOGETHER)
        yield from self.proposals()

    def _singles(self) -> list[Point]:
        """Return the points with one change that may help, the nearest first."""
        dials, found = self.space.dials, []
        for place, point in self.space.neighbours(self.space.asked):
            if self._may_help(dials[place], point[place]):
                dial = dials[place]
                found.append((self.space.distance(point), _KINDS.index(dial.kind), not dial.named, place, point))
        return [point for *_, point in sorted(found)]

    def _may_help(self, dial: Dial, option: int) -> bool:
        lost, damaged = self._lost
        if dial.kind in ("order", "again"):
            return dial.kind == "order" or self.space.steps[dial.options[option]] in lost
        step = self.space.steps[dial.step]
        if dial.kind == "layers" or option > dial.asked:
            return damaged or any(other != step for other in lost)
        return lost.get(step, False)

    @cached_property
    def _lost(self) -> tuple[dict[Step, bool], bool]:
        """The steps whose promises are broken, and whether anything else is.

        With each step, whether it could keep its promise by being stronger: not if it promises a value, such as bits.
        """
        run, damaged = self.bench.run, self.record.error is not None
        lost: dict[Step, bool] = {}
        result = run.result(self.asked)
        made = list(promises(run.recipe, self.asked, result.steps))
        for measurement in result.measurements or ():
            if measurement.metric in self.record.failed_metrics:
                about = [promise for promise in made if promise.about(measurement)]
                damaged = damaged or not about
                for promise in about:
                    lost[promise.step] = lost.get(promise.step, False) or promise.value is None
        return lost, damaged

    def _together(self, count: int) -> Iterator[tuple[Point, Trial]]:
        """Yield trials of several changes, the most promising first: effects of single changes are added up by gate."""
        asked, known = self.space.asked, self.study.known
        effects: dict[tuple[int, int], dict[str, float]] = {}
        for place, point in self.space.neighbours(asked):
            if point in known:
                effects[self._move(asked, point, place)] = _sum(known[point].violations, self.first.violations, -1)
        for _ in range(count):
            found = []
            for point, trial in known.items():
                for place, near in self.space.neighbours(point):
                    effect = effects.get(self._move(point, near, place), {})
                    expected = sum(max(0.0, left) for left in _sum(trial.violations, effect).values())
                    if expected < trial.violation and near not in known and near not in self.refused:
                        found.append((expected, self.space.distance(near), near))
            if not found:
                return
            near = min(found)[-1]
            if (tried := self.attempt(near)) is not None:
                yield near, tried

    def _move(self, start: Point, end: Point, place: int) -> tuple[int, int]:
        """Return a key that is equal for moves of a dial that should have the same effect."""
        if self.space.dials[place].kind == "setting":
            return place, 1 if end[place] > start[place] else -1
        return place, 2 + end[place]

    def _simplify(self, point: Point) -> None:
        """Take changes back while the gates stay green."""
        while True:
            simpler = [q for q in self._simpler(point) if (trial := self.attempt(q)) is not None and trial.green]
            if not simpler:
                return
            point = min(simpler, key=self.space.distance)

    def _simpler(self, point: Point) -> Iterator[Point]:
        """Yield points with one change less, or a setting one place nearer to what was asked for."""
        for place, dial in enumerate(self.space.dials):
            away = point[place] - dial.asked
            if away:
                yield self.space.moved(point, place, dial.asked)
            if dial.kind == "setting" and abs(away) > 1:
                yield self.space.moved(point, place, point[place] - (1 if away > 0 else -1))


def _sum(one: Mapping[str, float], other: Mapping[str, float], sign: int = 1) -> dict[str, float]:
    return {key: one.get(key, 0.0) + sign * other.get(key, 0.0) for key in {**one, **other}}
