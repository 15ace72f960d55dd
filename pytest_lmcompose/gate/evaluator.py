"""The verdicts of one run: its measurements, and those of what they are compared with, held against the rules."""

from __future__ import annotations

from evaluators.measurement import EvaluationError, Measurement
from pytest_lmcompose.baseline.reference import UPDATE, Circumstances
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.gate.judge import Reference, judge, paired_gates, settle
from pytest_lmcompose.gate.paired import BASE_MODEL
from pytest_lmcompose.gate.promises import promises
from pytest_lmcompose.gate.thresholds import BASELINE, compares_with, needs_baseline
from pytest_lmcompose.results import Gate
from pytest_lmcompose.run import Run


class GateEvaluator:
    """Judges the compositions of a run, and knows what paired gates were judged before."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.expected: tuple[Composition, ...] = ()
        """Compositions whose gates are going to be judged, here or in other workers; set before they are."""
        self._paired: dict[Composition, tuple[Gate, ...]] = {}
        """Gates of compositions with paired gates."""
        self._counted: dict[tuple[str, ...], tuple[frozenset[Composition], int]] = {}
        """By metrics: the compositions that are judged, and their paired gates."""

    def gates(self, composition: Composition) -> tuple[Gate, ...]:
        """Judge the measurements of `composition` by the thresholds.

        A paired gate is judged with those of the compositions before; see `gate.settle` for the end.
        """
        known = {c.id: self._reference(c) for c in compares_with(self.run.rules, composition)}
        if needs_baseline(self.run.rules, composition.id):
            known[BASELINE] = self._stored(composition)
        measured = self.run.measurements(composition)
        metrics = [m.metric for m in measured]
        gates = max(1, self._paired_gates(composition, tuple(metrics)))
        found = judge(
            self.run.rules,
            composition.id,
            measured,
            known,
            runs=self._runs(composition),
            gates=gates,
            promises=tuple(promises(self.run.recipe, composition)),
        )
        result = self.run.result(composition)
        result.gates = found
        if any(verdict.paired is not None for verdict in found):
            self._paired[composition] = found
            before = {c.id: verdicts for c, verdicts in self._paired.items()}
            result.gates = self._paired[composition] = settle(before, gates)[composition.id]
        return result.gates

    def _paired_gates(self, composition: Composition, metrics: tuple[str, ...]) -> int:
        """Return the number of paired gates of the run, where compositions are measured by `metrics`."""
        if metrics not in self._counted:  # once, and not anew for each of thousands of compositions
            planned = frozenset(self.expected)
            self._counted[metrics] = planned, sum(self._paired_in(c, metrics) for c in planned)
        planned, count = self._counted[metrics]
        return count if composition in planned else count + self._paired_in(composition, metrics)

    def _paired_in(self, composition: Composition, metrics: tuple[str, ...]) -> int:
        return paired_gates(self.run.rules, composition.id, metrics)

    def compared_with(self, composition: Composition) -> tuple[Composition, ...]:
        """Return the states that the gates of `composition` compared with, if they were judged here."""
        judged = composition in self.run.results and self.run.results[composition].gates is not None
        return compares_with(self.run.rules, composition) if judged else ()

    def _reference(self, composition: Composition) -> Reference:
        """Return a state that gates compare with, built and measured if need be."""
        name = composition.id if composition.steps else BASE_MODEL
        try:
            measured = self.run.measurements(composition)
        except (BuildError, EvaluationError) as error:
            if not composition.steps:  # without the base model nothing can be said
                raise
            return Reference(name, missing=f"it could not be measured: {error}")
        return Reference(name, measured, self._runs(composition))

    def _stored(self, composition: Composition) -> Reference:
        """Return what a stored run says of `composition`."""
        baselines = self.run.options.baselines
        if baselines.update or (self.run.baseline is None and baselines.stores):
            return Reference("the baseline", replaced=True)
        if self.run.baseline is None:
            missing = f"no run that passed is stored in {baselines.storage}; {UPDATE}"
            return Reference("the baseline", missing=missing)
        now = Circumstances(self.run.model_facts(), self.run.asked, self.run.seeds)
        return self.run.baseline.reference(composition.id, now)

    def _runs(self, composition: Composition) -> list[tuple[Measurement, ...]]:
        return [repeat.measurements for repeat in self.run.results[composition].repeats]
