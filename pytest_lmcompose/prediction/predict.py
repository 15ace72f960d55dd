"""Predict the better order of each pair from the states of single steps in the cache. Imports torch.

Three rules, for a promise p and the orders X+Y and Y+X:

1. A step keeps its own promise if it comes last, because it works on what is there: p(Y+X) = p(X) for a promise of X
   alone. If X comes first, p(X+Y) is measured on the weights that Y would make of X's, to first order (`effects`).
2. A promise of neither is measured on these weights for both orders, if a step prunes or rounds. Otherwise both orders
   have the same weights to first order, and nothing can be told.
3. A promise of both, such as of two edits, is what the last one makes of it: p(X+Y) = p(Y).
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

Values = Mapping[Promise, Tensor]


@dataclass
class Predictor:
    """Predicts pairs of steps with one model, which is in the state of the base model whenever it is not used here."""

    model: Any
    probes: Probes
    effects: Mapping[Step, Effect]

    def __post_init__(self) -> None:
        self._alone: dict[tuple[Step, Promise], Tensor] = {}

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
        values = self._values(first, second, there, back, concerned, lossy)
        told = [self._prediction(about, promise, *values[promise]) for promise in concerned]
        kept = None
        if lossy and one.category != other.category:
            kept = survival(one, other, there) if other.category == "compress" else survival(other, one, back)
        return Pair(*about, (*told, *wanted), commutator(one.base, there, back), kept, intensity)

    def _concerns(self, promise: Promise, one: Effect, other: Effect) -> bool:
        if not self.probes.pairs[promise]:
            return False
        return promise in ("perplexity", "recall") or promise in (one.category, other.category)

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
                self._own(step, promise) if owners[step] == promise else values.get(promise)
                for step, values in zip((second, first), found, strict=True)
            )
            for promise in concerned
        }

    def _own(self, step: Step, promise: Promise) -> Tensor:
        """Return the promise of a step on its own state."""
        if (step, promise) not in self._alone:
            self._alone[step, promise] = self._measured(self.effects[step].changed, [promise])[promise]
        return self._alone[step, promise]

    def _measured(self, weights: Mapping[str, Tensor], promises: list[Promise]) -> dict[Promise, Tensor]:
        if not promises:
            return {}
        with having(self.model, weights):
            return self.probes.measure(self.model, promises)

    def _prediction(
        self, about: tuple[str, str], promise: Promise, there: Tensor | None, back: Tensor | None
    ) -> Prediction:
        if there is None or back is None:
            return Prediction(*about, promise, None)
        gaps = there - back
        spread = float(gaps.std()) if len(gaps) > 1 else 0.0
        error = (spread**2 / len(gaps) + MODEL_ERROR[promise] ** 2) ** 0.5
        gap = float(gaps.mean())
        return Prediction(*about, promise, gap if gap == gap else None, error)

    def _bits_gap(self, one: Effect, other: Effect) -> float:
        """Return by how many bits per weight the order `one`, `other` is smaller."""
        sizes = {name: one.base[name].numel() for name in one.layers}
        gap = sum((one.bits(name, other) - other.bits(name, one)) * size for name, size in sizes.items())
        return gap / sum(sizes.values())
