"""Judge the compositions of a run: collect their measurements and references, and apply the rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from evaluators.measurement import EvaluationError, Measurement
from pytest_lmcompose.baseline.reference import UPDATE, Circumstances
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.composition_run import Result
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.gate.judge import Reference, count_paired, judge, settle
from pytest_lmcompose.gate.off import why_off
from pytest_lmcompose.gate.paired import BASE_MODEL
from pytest_lmcompose.gate.promises import promises
from pytest_lmcompose.gate.thresholds import BASELINE, LOSS_ERRORS, compares_with, needs_baseline
from pytest_lmcompose.results import CompositionResult, Gate
from pytest_lmcompose.run import Run

if TYPE_CHECKING:
    from pytest_lmcompose.steps import StepRecord

Look = Callable[[CompositionResult], None]


class GateEvaluator:
    """Judges the compositions of a run, and remembers their paired gates."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.expected: tuple[Composition, ...] = ()
        """Compositions with gates, here or in other workers; set this before judging the first one."""
        self._paired: dict[str, tuple[Gate, ...]] = {}
        """Gates of the compositions with paired gates, by id."""
        self._counted: dict[tuple[str, ...], tuple[frozenset[Composition], int]] = {}
        """By measured metrics: the expected compositions and the number of their paired gates."""

    def gates(self, composition: Composition, look: Look | None = None) -> tuple[Gate, ...]:
        """Judge the measurements of `composition` by the rules.

        Paired gates are corrected together with all judged so far; `judge.settle` corrects them finally. `look` is
        called while the composition is measured, if once, with the gates that compare single values: an exception of
        it ends the measuring, and nothing is kept.
        """
        rules, run = self.run.rules, self.run
        known = {other.id: self._state(other) for other in compares_with(rules, composition)}
        if needs_baseline(rules, composition.id):
            known[BASELINE] = self._stored_run(composition)
        if look is not None and len(run.seeds) == 1:
            run.watch = partial(self._look, composition, known, look)
        if run.recipe.evaluate.sequential and composition.steps and composition not in self._references:
            run.enough = partial(self._decided, composition, known)
        try:
            measured = run.measurements(composition)
        finally:
            run.watch = run.enough = None
        total = max(1, self._count_paired(composition, measured))
        found = judge(
            rules,
            composition.id,
            measured,
            known,
            runs=self._repeats(composition),
            gates=total,
            promises=tuple(promises(run.recipe, composition, run.result(composition).steps or ())),
            off=self.off,
        )
        if any(gate.paired is not None for gate in found):
            self._paired[composition.id] = found
            found = self._paired[composition.id] = settle(self._paired, total)[composition.id]
        run.result(composition).gates = found
        return found

    def _look(
        self,
        composition: Composition,
        known: Mapping[str, Reference],
        look: Look,
        seen: Composition,
        steps: Sequence[StepRecord],
        measured: Sequence[Measurement],
    ) -> None:
        """Show `look` what is known of `composition` so far."""
        if seen == composition:
            made = tuple(promises(self.run.recipe, composition, steps))
            gates = judge(self.run.rules, composition.id, measured, known, promises=made, off=self.off)
            single = tuple(gate for gate in gates if gate.value is not None and not gate.paired and not gate.pool)
            look(Result(composition, tuple(steps), measurements=tuple(measured), gates=single).record())

    @property
    def _references(self) -> set[Composition]:
        """What others are compared with, which is measured as a whole."""
        return {other for c in self.expected for other in compares_with(self.run.rules, c)}

    def _decided(
        self,
        composition: Composition,
        known: Mapping[str, Reference],
        seen: Composition,
        steps: Sequence[StepRecord],
        measured: Sequence[Measurement],
    ) -> bool:
        """Return whether a gate on questions has failed, or all have passed, whatever the answers to the others are.

        A bound of a value is decided if the same verdict holds with all other answers right, and with all wrong. A
        gate that tests for a drop can only fail early, and one that asks for evidence only pass.
        """
        if seen != composition or any(not 0 <= x <= 1 for m in measured for x in m.samples):
            return False
        made = tuple(promises(self.run.recipe, composition, steps))
        whole = max((reference.measurements for reference in known.values()), key=len, default=measured)
        total = max(1, self._count_paired(composition, whole))

        def judged(value_of: Callable[[Measurement], float]) -> list[Gate]:
            found = [dataclasses.replace(m, value=value_of(m)) for m in measured]
            gates = judge(
                self.run.rules, composition.id, found, known, runs=[measured], gates=total, promises=made, off=self.off
            )
            return [gate for gate in gates if gate.value is not None]

        now = judged(lambda m: m.value)
        lowest = judged(lambda m: m.value * m.n / m.total)
        highest = judged(lambda m: 1 - (1 - m.value) * m.n / m.total)
        verdicts = [
            None
            if (gate.paired and (gate.passed or gate.paired.p * total > (gate.threshold or 0.0)))
            or (gate.evidence and not gate.passed)
            or (not gate.paired and not gate.evidence and low.passed != high.passed)
            or gate.gate == LOSS_ERRORS
            else gate.passed
            for gate, low, high in zip(now, lowest, highest, strict=True)
        ]
        return False in verdicts or (bool(verdicts) and None not in verdicts)

    def off(self, glob: str) -> str | None:
        """Return why the recipe measures no metric that `glob` matches."""
        return why_off(glob, self.run.recipe.world, self.run.recipe.evaluate)

    def _state(self, composition: Composition) -> Reference:
        """Return a state of this run as a reference; build and measure it if necessary."""
        name = composition.id if composition.steps else BASE_MODEL
        try:
            measured = self.run.measurements(composition)
        except (BuildError, EvaluationError) as error:
            if not composition.steps:  # no gate makes sense without the base model
                raise
            return Reference(name, missing=f"it could not be measured: {error}")
        return Reference(name, measured, self._repeats(composition))

    def _stored_run(self, composition: Composition) -> Reference:
        """Return the record of `composition` in the baseline as a reference."""
        baselines = self.run.options.baselines
        if baselines.update or (self.run.baseline is None and baselines.stores):
            return Reference("the baseline", replaced=True)
        if self.run.baseline is None:
            return Reference("the baseline", missing=f"no run that passed is stored in {baselines.storage}; {UPDATE}")
        now = Circumstances(self.run.model_facts(), self.run.data_hashes, self.run.seeds)
        return self.run.baseline.reference(composition.id, now)

    def _repeats(self, composition: Composition) -> list[tuple[Measurement, ...]]:
        return [repeat.measurements for repeat in self.run.results[composition].repeats]

    def _count_paired(self, composition: Composition, measured: Sequence[Measurement]) -> int:
        """Return the number of paired gates of the run, if every composition is measured like `measured`."""
        rules, metrics = self.run.rules, tuple(m.metric for m in measured)
        if metrics not in self._counted:  # there may be thousands of compositions
            expected = frozenset(self.expected)
            self._counted[metrics] = expected, sum(count_paired(rules, c.id, measured) for c in expected)
        expected, count = self._counted[metrics]
        return count if composition in expected else count + count_paired(rules, composition.id, measured)

    def compared_with(self, composition: Composition) -> tuple[Composition, ...]:
        """Return the states that the gates of `composition` were compared with; none before they are judged."""
        judged = composition in self.run.results and self.run.results[composition].gates is not None
        return compares_with(self.run.rules, composition) if judged else ()
