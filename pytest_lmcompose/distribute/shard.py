"""Split a suite into shards for several machines. Imports no torch.

All machines sort the compositions depth first through their prefix tree and cut them into pieces of about equal work,
so a piece consists of whole subtrees except at its two ends. Work is a number of steps and measurements, not seconds:
each machine has recorded other times, and with different weights machines would skip compositions or test them twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import eq

from pytest_lmcompose.composition import Composition, Step

Cost = Callable[[Step | None], float]
"""The cost of applying a step; for None, the cost of measuring a state."""


@dataclass(frozen=True)
class Shard:
    """One of `count` shards, counted from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, compositions: Iterable[Composition]) -> frozenset[Composition]:
        """Return the compositions of this shard."""
        return frozenset(split(compositions, self.count)[self.index - 1])


def read_shard(text: str) -> Shard:
    """Parse `2/5`; raises ValueError with the expected form."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"expected K/N with K from 1 to N, such as 2/5, not {text!r}")
    return Shard(int(match[1]), int(match[2]))


def alike(step: Step | None) -> float:
    """Count every step and every measurement as 1."""
    return 1.0


def split(compositions: Iterable[Composition], count: int, cost: Cost = alike) -> tuple[tuple[Composition, ...], ...]:
    """Cut the distinct `compositions` into `count` consecutive pieces of their depth-first order.

    Minimises the cost of the most expensive piece. Pieces are empty only if there are fewer compositions than pieces.
    The result does not depend on the order of `compositions`.
    """
    order = sorted(set(compositions))  # depth first: a prefix sorts before its extensions
    pieces = _cut(order, _smallest_limit(order, count, cost), cost)
    while len(pieces) < min(count, len(order)):
        at = max((i for i, p in enumerate(pieces) if len(p) > 1), key=lambda i: (work(pieces[i], cost), -i))
        half = len(pieces[at]) // 2
        pieces[at : at + 1] = [pieces[at][:half], pieces[at][half:]]
    return (*pieces, *[()] * (count - len(pieces)))


def work(order: Sequence[Composition], cost: Cost = alike) -> float:
    """Return the cost of testing compositions in depth-first order, where shared prefixes are built once."""
    total, before = 0.0, Composition()
    for composition in order:
        total += _added(before, composition, cost)
        before = composition
    return total


def _added(before: Composition, composition: Composition, cost: Cost) -> float:
    """Return the cost of `composition` after `before`: the steps they do not share, and a measurement."""
    shared = sum(map(eq, before.prefixes(), composition.prefixes()))
    return sum(cost(step) for step in composition.steps[shared:]) + cost(None)


def _cut(order: Sequence[Composition], limit: float, cost: Cost) -> list[tuple[Composition, ...]]:
    """Cut `order` into as few consecutive pieces as possible, each with a cost of at most `limit`."""
    pieces: list[list[Composition]] = []
    held = 0.0
    for composition in order:
        added = _added(pieces[-1][-1], composition, cost) if pieces else 0.0
        if not pieces or held + added > limit:
            pieces.append([])
            held, added = 0.0, _added(Composition(), composition, cost)
        pieces[-1].append(composition)
        held += added
    return [tuple(piece) for piece in pieces]


def _smallest_limit(order: Sequence[Composition], count: int, cost: Cost) -> float:
    """Return the smallest limit for which `count` pieces are enough, to within 0.1 %."""
    low = max((work([composition], cost) for composition in order), default=0.0)
    high = max(low, work(order, cost))
    while len(_cut(order, low, cost)) > count and high - low > low / 1000:
        middle = (low + high) / 2
        if len(_cut(order, middle, cost)) > count:
            low = middle
        else:
            high = middle
    return low if len(_cut(order, low, cost)) <= count else high
