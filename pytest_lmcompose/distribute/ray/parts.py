"""Divide the plan into parts for a cluster: subtrees, linked by the states that they start from.

A subtree that is too large for one task becomes one part that builds only its first state, and further parts that
start from that state. So each state is still built once, and the work below it is distributed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.distribute.shard import Cost
from pytest_lmcompose.plan import Node, Plan


@dataclass(frozen=True)
class Part:
    """The tests that one task runs."""

    compositions: tuple[Composition, ...]
    """The compositions to test, in depth-first order."""
    start: Composition
    """The state to start from."""
    after: int | None
    """Number of the part that builds `start`; None if it is the base model."""
    leaves: Composition | None
    """The state that later parts start from, if any."""
    cost: float
    """Cost of this part and of the most expensive chain of parts after it."""


def parts(compositions: Iterable[Composition], tasks: int, cost: Cost, least: float = 0.0) -> tuple[Part, ...]:
    """Divide the distinct `compositions` into parts that cost at most total / `tasks`, or `least` if that is more.

    A single state that costs more is a part by itself. A part comes after the part that it starts from.
    """
    root = Plan.of(sorted(set(compositions))).root
    weights = _weights(root, cost)
    found: list[Part] = []
    limit = max(least, weights[root.prefix] / max(1, tasks))
    _divide(root, None, limit, weights, found, first=True)
    return tuple(_with_paths(found))


def _divide(
    node: Node,
    after: int | None,
    limit: float,
    weights: dict[Composition, float],
    found: list[Part],
    *,
    first: bool = False,
) -> None:
    """Append the parts below `node`, which part `after` builds; with `first`, include the test of `node` itself."""
    bundle: list[Node] = [Node(node.prefix, node.wanted)] if first and node.wanted else []
    held = weights[node.prefix] - sum(weights[child.prefix] for child in node.children) if bundle else 0.0

    def close() -> None:
        if bundle:
            tests = tuple(below.prefix for top in bundle for below in top.walk() if below.wanted)
            found.append(Part(tests, node.prefix, after, None, held))
            bundle.clear()

    for child in node.children:
        weight = weights[child.prefix]
        if weight > limit and child.children:
            own = weight - sum(weights[below.prefix] for below in child.children)
            found.append(Part((child.prefix,) * child.wanted, node.prefix, after, child.prefix, own))
            _divide(child, len(found) - 1, limit, weights, found)
            continue
        if held + weight > limit:
            close()
            held = 0.0
        bundle.append(child)
        held += weight
    close()


def _weights(root: Node, cost: Cost) -> dict[Composition, float]:
    """Return the cost of each state including its whole subtree."""
    found: dict[Composition, float] = {}
    for node in reversed(list(root.walk())):
        own = cost(node.prefix.steps[-1]) if node.prefix.steps else 0.0
        measured = cost(None) if node.wanted else 0.0
        found[node.prefix] = own + measured + sum(found[child.prefix] for child in node.children)
    return found


def _with_paths(found: list[Part]) -> Iterator[Part]:
    """Yield the parts, with the cost of the most expensive chain that begins at each."""
    below = [0.0] * len(found)
    for number in reversed(range(len(found))):
        part = found[number]
        below[number] += part.cost
        if part.after is not None:
            below[part.after] = max(below[part.after], below[number])
    for number, part in enumerate(found):
        yield Part(part.compositions, part.start, part.after, part.leaves, below[number])
