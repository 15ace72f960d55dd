"""Shards: the part of a suite that one machine of several tests. Imports no torch.

The compositions are put in an order that depends on nothing but themselves, depth first through their
prefix tree, and cut into pieces of about equal work, so that a piece is whole subtrees but for its two
ends. Work is counted in applications and measurements: what earlier runs took is known to each machine
alone, and machines that counted differently would test something twice, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pytest_lmcompose.composition import Composition, Step

Cost = Callable[[Step | None], float]
"""What applying a step costs, or measuring a state where the step is None."""


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
    """Read `2/5`; raises ValueError that says what was expected."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"expected K/N with K from 1 to N, such as 2/5, not {text!r}")
    return Shard(int(match[1]), int(match[2]))


def alike(step: Step | None) -> float:
    """Count every application and every measurement as one."""
    return 1.0


def split(compositions: Iterable[Composition], count: int, cost: Cost = alike) -> tuple[tuple[Composition, ...], ...]:
    """Cut the distinct `compositions` into `count` pieces, each in depth-first order.

    The most expensive piece is as cheap as consecutive pieces of that order can be. No piece is empty
    unless there are fewer compositions than pieces. The order in which they are given does not count.
    """
    order = sorted(set(compositions))  # which is depth first, since a prefix sorts before what goes on from it
    pieces = _cut(order, _smallest_limit(order, count, cost), cost)
    while len(pieces) < min(count, len(order)):
        at = max((i for i, p in enumerate(pieces) if len(p) > 1), key=lambda i: (work(pieces[i], cost), -i))
        half = len(pieces[at]) // 2
        pieces[at : at + 1] = [pieces[at][:half], pieces[at][half:]]
    return (*pieces, *[()] * (count - len(pieces)))


def work(order: Sequence[Composition], cost: Cost = alike) -> float:
    """Return what it costs to test compositions in depth-first order, shared prefixes built once."""
    total, before = 0.0, Composition()
    for composition in order:
        total += _added(before, composition, cost)
        before = composition
    return total


def _added(before: Composition, composition: Composition, cost: Cost) -> float:
    """Return what `composition` costs behind the one before: its own steps, and its measurement."""
    shared = 0
    for one, other in zip(before.steps, composition.steps, strict=False):
        if one != other:
            break
        shared += 1
    return sum(cost(step) for step in composition.steps[shared:]) + cost(None)


def _cut(order: Sequence[Composition], limit: float, cost: Cost) -> list[tuple[Composition, ...]]:
    """Cut `order` into as few consecutive pieces as cost no more than `limit` each."""
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
    """Return a limit that `count` pieces can keep to, at most a thousandth above the smallest one."""
    low = max((work([composition], cost) for composition in order), default=0.0)
    high = max(low, work(order, cost))
    while len(_cut(order, low, cost)) > count and high - low > low / 1000:
        middle = (low + high) / 2
        if len(_cut(order, middle, cost)) > count:
            low = middle
        else:
            high = middle
    return low if len(_cut(order, low, cost)) <= count else high
