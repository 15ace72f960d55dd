"""Predict the better order of each pair from the states of single steps in the cache. Imports torch.

Four rules, for a promise p and the orders X+Y and Y+X:

1. A step keeps its own promise if it comes last, because it works on what is there: p(Y+X) = p(X) for a promise of X
   alone. If X comes first, p(X+Y) is measured on the weights that Y would make of X's, to first order (`effects`).
2. For a promise of neither, an edit is better after pruning than before it: it makes up for what is gone, and loses no
   part of its own change. This needs an edit that reaches its own promise.
3. Otherwise a promise of neither is measured on these weights for both orders, if a step prunes or rounds and they
   are far enough apart. If none does, both orders have the same weights to first order, and nothing can be told.
4. A promise of both, such as of two edits, is what the last one makes of it: p(X+Y) = p(Y).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pytest_lmcompose.composition import Step
from pytest_lmcompose.prediction.effects import Effect, commutator, survival
from pytest_lmcompose.prediction.probes import PROMISES, Probes, Promise, having
from pytest_lmcompose.prediction.records import MODEL_ERROR, Pair, Prediction

RULES = {"last": 0.93, "pruned": 0.91}
"""How often rule 1 and rule 2 name the better order where its effect is significant, see docs/prediction.md."""
_EXTRA = 0.2
"""What pruning costs more after another step than before it, relative to what it costs alone."""
_NEAR = 0.2
"""Commutator below which both orders of a lossy step are too near for a promise of neither."""
_REACHED = 0.5
"""Least gain of an edit that reaches its promise, in probability."""


@dataclass
class Predictor:
    """Predicts pairs of steps with one model, which is in the state of the base model whenever it is not used here."""

    model: Any
    probes: Probes
    effects: Mapping[Step, Effect]

    def __post_init__(self) -> None:
        self._known: dict[tuple[Step | None, Promise], Tensor] = {}

    def pairs(self, steps: Iterable[tuple[Step, Step]]) -> Iterator[Pair]:
        """Yield a prediction for each pair whose states are known."""
        for first, second in steps:
            if first in self.effects and second in self.effects:
                yield self.pair(first, second)

    def pair(self, first: Step, second: Step) -> Pair:
        """Predict one pair."""
        one, other = self.effects[first], self.effects[second]
        about = (str(first), str(second))
        intensity = (one.intensity, other.intensity)
        bits = Prediction(*about, "bits", self._bits_gap(one, other))
        concerned = [p for p in PROMISES if self._concerns(p, one, other)]
        wanted = [bits] if "compress" in (one.category, other.category) else []
        if not (one.readable and other.readable):
            unknown = [Prediction(*about, promise, None) for promise in concerned]
            return Pair(*about, (*unknown, *wanted), None, None, intensity)
        lossy = "compress" in (one.category, other.category)
        there = other.after(one)
        back = one.after(other) if lossy else there
        distance = commutator(one.base, there, back)
        owners = (one.category, other.category)
        pruned = self._pruned(first, second)
        near = lossy and distance < _NEAR
        measured = [p for p in concerned if p in owners or not (pruned is not None or near)]
        values = self._values(first, second, there, back, measured, lossy)
        told = []
        for promise in concerned:
            if promise in values:
                last = RULES["last"] if other.category == promise else 1 - RULES["last"]
                rule = last if owners.count(promise) == 1 else 0.5
                told.append(self._prediction(about, rule, promise, *values[promise]))
            elif pruned is not None:
                told.append(self._after_pruning(about, promise, pruned))
            else:
                told.append(Prediction(*about, promise, 0.0, MODEL_ERROR[promise]))
        kept = None
        if lossy and one.category != other.category:
            kept = survival(one, other, there) if other.category == "compress" else survival(other, one, back)
        return Pair(*about, (*told, *wanted), distance, kept, intensity)

    def _concerns(self, promise: Promise, one: Effect, other: Effect) -> bool:
        if not self.probes.pairs[promise]:
            return False
        return promise in ("perplexity", "recall") or promise in (one.category, other.category)

    def _pruned(self, first: Step, second: Step) -> Step | None:
        """Return the step that prunes, if the other one is an edit that reaches its promise; otherwise None."""
        for step, other in ((first, second), (second, first)):
            if self.effects[step].masks and self.effects[other].category == "edit" and self.probes.pairs["edit"]:
                return step if self._gain(other, "edit") >= _REACHED else None
        return None

    def _after_pruning(self, about: tuple[str, str], promise: Promise, pruning: Step) -> Prediction:
        """Predict a promise of neither by rule 2."""
        cost = max(-self._gain(pruning, promise), 0.0)
        first = about[0] == str(pruning)
        rule = RULES["pruned"] if first else 1 - RULES["pruned"]
        return Prediction(*about, promise, _EXTRA * cost * (1 if first else -1), cost, rule)

    def _values(
        self,
        first: Step,
        second: Step,
        there: Mapping[str, Tensor],
        back: Mapping[str, Tensor],
        concerned: list[Promise],
        lossy: bool,
    ) -> dict[Promise, tuple[Tensor | None, Tensor | None]]:
        """Return the values of both orders by promise; None where nothing is known."""
        owners = {step: self.effects[step].category for step in (first, second)}
        asked: tuple[list[Promise], list[Promise]] = ([], [])
        for promise in concerned:
            last = (owners[second] == promise, owners[first] == promise)  # whether the last step of the order owns it
            for wanted, own in zip(asked, last, strict=True):
                if not own and (lossy or promise in owners.values()):
                    wanted.append(promise)
        if not lossy:  # both orders have the same weights
            both = self._measured(there, [p for p in concerned if p in asked[0] or p in asked[1]])
            found = ({p: both[p] for p in asked[0]}, {p: both[p] for p in asked[1]})
        else:
            found = (self._measured(there, asked[0]), self._measured(back, asked[1]))
        return {
            promise: tuple(  # type: ignore[misc]
                self._alone(step, promise) if owners[step] == promise else values.get(promise)
                for step, values in zip((second, first), found, strict=True)
            )
            for promise in concerned
        }

    def _gain(self, step: Step, promise: Promise) -> float:
        return float((self._alone(step, promise) - self._alone(None, promise)).mean())

    def _alone(self, step: Step | None, promise: Promise) -> Tensor:
        """Return a promise on the state of a step, or of the base model."""
        if (step, promise) not in self._known:
            weights = {} if step is None else self.effects[step].changed
            self._known[step, promise] = self._measured(weights, [promise])[promise]
        return self._known[step, promise]

    def _measured(self, weights: Mapping[str, Tensor], promises: list[Promise]) -> dict[Promise, Tensor]:
        if not promises:
            return {}
        with having(self.model, weights):
            return self.probes.measure(self.model, promises)

    def _prediction(
        self, about: tuple[str, str], rule: float, promise: Promise, there: Tensor | None, back: Tensor | None
    ) -> Prediction:
        if there is None or back is None:
            return Prediction(*about, promise, None)
        gaps = there - back
        spread = float(gaps.std()) if len(gaps) > 1 else 0.0
        error = (spread**2 / len(gaps) + MODEL_ERROR[promise] ** 2) ** 0.5
        gap = float(gaps.mean())
        return Prediction(*about, promise, gap if gap == gap else None, error, rule)

    def _bits_gap(self, one: Effect, other: Effect) -> float:
        """Return by how many bits per weight the order `one`, `other` is smaller."""
        sizes = {name: one.base[name].numel() for name in one.layers}
        gap = sum((one.bits(name, other) - other.bits(name, one)) * size for name, size in sizes.items())
        return gap / sum(sizes.values())
