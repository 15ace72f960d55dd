"""Repair a composition: find the change nearest to what was asked for that turns all gates green.

The search goes from trial to trial by single changes: another order, a repeated step, layers to spare, a setting one
place on. Only those are tried that may help: a step that broke others' promises, or what every step must leave alone,
becomes milder, and a step whose promise is broken is repeated or becomes stronger. A composition in which a step
undoes another's promise, as its settings tell, is red for certain and never tried.

The change that promises the least violation of the gates comes first. What a change did once, it is expected to do
again, gate by gate; one that was not tried yet is expected to halve the violation. Of about equal ones, the nearest to
what was asked for comes first, then the quickest. When no change promises anything, Optuna proposes (TPE, with the
violation as a constraint). A trial stops when its red gates show that it is no better than the best one.

What is found is simplified: each change is taken back, in whole or by one place, if the gates stay green. Then single
changes that are nearer, and were not tried yet, get their chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from evaluators.measurement import Measurement
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.gate.globs import matches
from pytest_lmcompose.gate.promises import promises, unkept
from pytest_lmcompose.gate.thresholds import PROMISED, rules_for
from pytest_lmcompose.search.records import Trial
from pytest_lmcompose.search.searcher import Searcher
from pytest_lmcompose.search.space import Point
from pytest_lmcompose.search.study import Direction

_HOPE = 0.5
"""Share of the violation that an untried change is expected to leave."""


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

    def enough(self) -> float | None:
        """Return the violation of the best trial: one that shows as much is not better."""
        return self.best.violation

    def hopeless(self, composition: Composition) -> bool:
        """Return whether the steps of a composition cannot keep their promises, whatever the model."""
        if composition not in self._hopeless:
            rules = [rule for rule in self.bench.run.rules if rule.covers(composition.id)]
            self._hopeless[composition] = any(
                bound.kind == PROMISED
                for metric in self._undone(composition) - self._kept
                for rule in rules_for(rules, metric)
                for bound in rule.bounds
            )
        return self._hopeless[composition]

    def search(self) -> None:
        """Search until a repair is found and nothing nearer is left to try, or the budget is spent."""
        if self.first.green:
            return
        found = next((point for point, trial in self._trials() if trial.green), None)
        if found is not None:
            self._simplify(found)
            asked = self.space.asked
            nearer = [(self.space.distance(near), near) for _, near in self._helpful(asked, self.first)]
            for distance, near in sorted(nearer):
                if distance < self.best.distance:
                    self.attempt(near)

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
        while (point := self._next()) is not None:
            if (trial := self.attempt(point)) is not None:
                yield point, trial
        yield from self.proposals()

    def _next(self) -> Point | None:
        """Return the point to try next, one change from a trial; None if none promises less violation."""
        effects, found = self._effects(), []
        for start, trial in self.study.known.items():
            for place, near in self._helpful(start, trial):
                composition = self.space.composition(near)
                if near in self.study.known or near in self.refused or composition is None:
                    continue
                effect = effects.get(self._move(start, near, place))
                expected = (
                    _HOPE * trial.violation
                    if effect is None
                    else sum(max(0.0, left) for left in _sum(trial.violations, effect).values())
                )
                if expected < trial.violation and not self.hopeless(composition):
                    halvings = math.ceil(math.log2(expected / self.first.violation)) if expected else -math.inf
                    found.append((halvings, self.space.distance(near), self.bench.expected(composition), near))
        return min(found)[-1] if found else None

    def _helpful(self, start: Point, trial: Trial) -> Iterator[tuple[int, Point]]:
        """Yield the points that one change which may help leads to, with the number of the dial."""
        lost, damaged = self._lost(start, trial)
        for place, near in self.space.neighbours(start):
            dial, option = self.space.dials[place], near[place]
            if (
                dial.kind == "order"
                or (dial.kind == "again" and dial.options[option] in lost)
                or (dial.key and option > start[place] and (damaged or any(step != dial.step for step in lost)))
                or (dial.kind == "setting" and option < start[place] and lost.get(dial.step))
            ):
                yield place, near

    def _lost(self, point: Point, trial: Trial) -> tuple[dict[int, bool], bool]:
        """Return the places of the steps whose promises a trial breaks, and whether it breaks anything else.

        With each place, whether its step could keep its promise by being stronger: not if it promises a value, such as
        bits.
        """
        composition = self.space.composition(point)
        assert composition is not None
        places = dict(zip(composition.steps, self.space.places(point), strict=True))
        made = list(promises(self.bench.run.recipe, composition))
        failed = {gate.rpartition(" ")[0] for gate in trial.failed}
        lost: dict[int, bool] = {}
        damaged = trial.error is not None
        for measurement in self._measured:
            if any(matches(glob, measurement.metric) for glob in failed):  # a pool has a glob
                about = [promise for promise in made if promise.about(measurement)]
                damaged = damaged or not about
                for promise in about:
                    place = places[promise.step]
                    lost[place] = lost.get(place, False) or promise.value is None
        return lost, damaged

    @cached_property
    def _measured(self) -> Sequence[Measurement]:
        """The metrics, as what was asked for has them, or the base model if that failed."""
        return self.bench.run.result(self.asked).measurements or self.bench.run.measurements(Composition())

    @cached_property
    def _hopeless(self) -> dict[Composition, bool]:
        return {}

    def _undone(self, composition: Composition) -> set[str]:
        """Return the metrics about which a step promises something that a later one undoes."""
        lost = unkept(self.bench.run.recipe, composition)
        return {m.metric for m in self._measured if any(promise.about(m) for promise in lost)}

    @cached_property
    def _kept(self) -> set[str]:
        """Those of what was asked for whose gates passed all the same."""
        return self._undone(self.asked) - self.record.failed_metrics if self.record.error is None else set()

    def _effects(self) -> dict[tuple[int, int], dict[str, float]]:
        """Return what changes did to the violation of each gate, as they did last."""
        known, found = self.study.known, {}
        for start, trial in known.items():
            for place, near in self.space.neighbours(start):
                if near in known:
                    found[self._move(start, near, place)] = _sum(known[near].violations, trial.violations, -1)
        return found

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
