"""Predictions as plain records. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pytest_lmcompose.composition import Composition, Step

PROBABLE = 0.9
"""Probability from which an order is called better."""
SURE = 0.95
"""The most that a gap counts where a rule says something too."""
UNKNOWN = 4.0
"""Information of a pair without a prediction: more than any other."""
MODEL_ERROR = {"edit": 0.03, "unlearn": 0.1, "perplexity": 0.03, "recall": 0.1}
"""Standard errors of the first-order model; see docs/prediction.md."""


@dataclass(frozen=True)
class Prediction:
    """Which order of two steps is better for one promise."""

    first: str
    second: str
    promise: str
    """edit, unlearn, perplexity, recall or bits."""
    gap: float | None
    """Value of `first+second` minus that of `second+first`, where more is better; None: unknown.

    In the units of `probes.Probes.measure`; for bits, fewer bits per weight.
    """
    error: float = 0.0
    """Standard error of the gap; 0 for bits."""
    rule: float = 0.5
    """The probability by a rule that `first+second` is better, whatever the gap; 0.5: no rule."""

    @property
    def probability(self) -> float:
        """The probability that `first+second` is the better order; 0.5 where nothing is known.

        The odds of the rule times those of the gap, which never count more than `SURE`.
        """
        if not self.gap:
            return 0.5
        if self.error == 0:
            return float(self.gap > 0)
        of_gap = 0.5 * math.erfc(-self.gap / self.error / math.sqrt(2))
        if self.rule == 0.5:
            return of_gap
        of_gap = min(max(of_gap, 1 - SURE), SURE)
        odds = self.rule / (1 - self.rule) * of_gap / (1 - of_gap)
        return odds / (1 + odds)

    @property
    def better(self) -> str | None:
        """The better order; None: cannot tell."""
        if max(self.probability, 1 - self.probability) < PROBABLE:
            return None
        return self.orders[0] if self.probability > 0.5 else self.orders[1]

    @property
    def orders(self) -> tuple[str, str]:
        """Both orders."""
        return f"{self.first}+{self.second}", f"{self.second}+{self.first}"

    @property
    def information(self) -> float:
        """How much a measurement is expected to tell: the entropy of the sign in bits, times the size of the effect."""
        p = self.probability
        entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
        return entropy * (1.0 if self.gap is None else abs(self.gap) + self.error)

    def plain(self) -> dict[str, Any]:
        """Return the prediction as JSON data."""
        return asdict(self) | {"better": self.better, "probability": self.probability}


@dataclass(frozen=True)
class Pair:
    """The predictions for two steps, and what they follow from."""

    first: str
    second: str
    predictions: tuple[Prediction, ...]
    commutator: float | None
    """Distance between the states of both orders, relative to the weights where they differ; None: unknown."""
    survival: float | None
    """Share of the change by the one step that is left after the lossy other; None without such steps."""
    intensity: tuple[float, float]
    """Norm of each step's change, relative to the weights that it changes."""

    @property
    def information(self) -> float:
        """The sum over promises."""
        return sum(prediction.information for prediction in self.predictions)

    def plain(self) -> dict[str, Any]:
        """Return the pair as JSON data."""
        about = {key: value for key, value in asdict(self).items() if key != "predictions"}
        return about | {"predictions": [prediction.plain() for prediction in self.predictions]}


def pairs_of(compositions: Iterable[Composition]) -> tuple[tuple[Step, Step], ...]:
    """Return the pairs of different steps that the compositions of two steps apply, each once."""
    found: dict[frozenset[Step], tuple[Step, Step]] = {}
    for composition in compositions:
        if len(composition.steps) == 2 and len(set(composition.steps)) == 2:
            first, second = composition.steps
            found.setdefault(frozenset(composition.steps), (first, second))
    return tuple(found.values())


def in_order_of_information(compositions: Sequence[Composition], pairs: Iterable[Pair]) -> list[Composition]:
    """Sort compositions: single steps first, then both orders of each pair, those that tell most first.

    A longer composition counts as its neighbouring pairs together. A pair without a prediction tells most.
    """
    known = {frozenset((pair.first, pair.second)): pair.information for pair in pairs}
    place = {composition: number for number, composition in enumerate(compositions)}
    firsts: dict[frozenset[str], int] = {}
    for composition, number in place.items():
        firsts.setdefault(frozenset(map(str, composition.steps)), number)

    def key(composition: Composition) -> tuple[float, int, int]:
        names = list(map(str, composition.steps))
        told = math.fsum(known.get(frozenset(two), UNKNOWN) for two in itertools.pairwise(names))
        return -told if len(names) > 1 else -math.inf, firsts[frozenset(names)], place[composition]

    return sorted(compositions, key=key)
