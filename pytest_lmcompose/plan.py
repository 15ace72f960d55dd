"""Plan a run: the prefix tree of its compositions, the order of work, and the cost. Imports no torch.

A state that several compositions share is one node of the tree, so it is built once. Two steps are the same only if
their settings are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from pytest_lmcompose.composition import BASE, Composition, Step
from pytest_lmcompose.costs import Costs

Reads = Callable[[Step], Iterable[Composition]]
"""Returns the compositions whose states a step reads."""


def reads_none(step: Step) -> tuple[Composition, ...]:
    """Return no compositions."""
    return ()


def needed(composition: Composition, reads: Reads) -> tuple[Composition, ...]:
    """Return the states that are built for `composition`: those that its steps read, then its prefixes."""
    read = (state for step in composition.steps for other in reads(step) for state in needed(other, reads))
    return tuple(dict.fromkeys((*read, *composition.prefixes())))


@dataclass(frozen=True)
class Node:
    """One state of the model: its prefix, and the states that are built from it."""

    prefix: Composition
    wanted: bool
    """Whether this state is tested, and not only an intermediate state."""
    children: tuple[Node, ...] = ()
    """In build order."""

    def walk(self) -> Iterator[Node]:
        """Yield this node and its descendants, depth first, parents before children."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


@dataclass(frozen=True)
class Plan:
    """A prefix tree of compositions; equal plans do the same work in the same order."""

    root: Node
    """The base model."""
    reads: Reads = field(default=reads_none, compare=False)

    @classmethod
    def of(cls, compositions: Iterable[Composition], reads: Reads = reads_none) -> Plan:
        """Return the plan of the distinct `compositions`, with the states that their steps read.

        Siblings keep the given order, after those that they read.
        """
        wanted = set()
        children: dict[Composition, list[Composition]] = {Composition(): []}
        for composition in compositions:
            wanted.add(composition)
            for prefix in needed(composition, reads):
                if prefix not in children:
                    children[prefix] = []
                    children[Composition(prefix.steps[:-1])].append(prefix)
        nodes: dict[Composition, Node] = {}
        for prefix in sorted(children, key=lambda c: len(c.steps), reverse=True):  # children before parents
            nodes[prefix] = Node(prefix, prefix in wanted, tuple(nodes[child] for child in children[prefix]))
        return cls(nodes[Composition()], reads)

    @cached_property
    def order(self) -> tuple[Composition, ...]:
        """The compositions to test, depth first."""
        return tuple(node.prefix for node in self.root.walk() if node.wanted)

    @cached_property
    def states(self) -> tuple[Composition, ...]:
        """Every state that is built, in build order, without the base model."""
        return tuple(node.prefix for node in self.root.walk())[1:]

    @property
    def applications(self) -> int:
        """Number of step applications if each state is built once."""
        return len(self.states)

    @property
    def applications_from_scratch(self) -> int:
        """Number of step applications if each composition started from the base model."""
        return sum(len(needed(composition, self.reads)) for composition in self.order)

    def seconds(self, costs: Costs) -> float:
        """Return the expected seconds of all steps and evaluations; unknown costs count as 0."""
        steps = sum(costs.seconds(state.steps[-1]) or 0.0 for state in self.states)
        return steps + len(self.order) * (costs.evaluation or 0.0)

    def peak_bytes(self, costs: Costs) -> int:
        """Return the peak size of all snapshots in memory; unknown costs count as 0.

        A snapshot adds only the tensors that its own step changed.
        """
        held = peak = 0
        live: list[Composition] = []
        for state in self.states:
            # Depth first, only the ancestors of this state are still needed.
            while live and live[-1].steps != state.steps[: len(live[-1].steps)]:
                held -= costs.bytes(live.pop().steps[-1]) or 0
            live.append(state)
            held += costs.bytes(state.steps[-1]) or 0
            peak = max(peak, held)
        return peak

    def lines(self, costs: Costs, repeats: int = 1) -> Iterator[str]:
        """Yield the plan as text: savings and costs, then the tree with one state per line."""
        tested, states = len(self.order), self.applications
        saved = self.applications_from_scratch - states
        yield (
            f"{tested} composition{'s' * (tested != 1)}: {states} step{'s' * (states != 1)} to apply instead of "
            f"{self.applications_from_scratch} ({saved} saved by shared prefixes)"
            f"{f', {repeats} times' if repeats > 1 else ''}"
        )
        total, peak = repeats * self.seconds(costs), repeats * self.peak_bytes(costs)
        yield from costs.lines(total, peak, [state.steps[-1] for state in self.states])
        if any(not node.wanted for node in self.root.walk()):
            yield "(in brackets: intermediate states, not tested)"
        for node in self.root.walk():
            depth = len(node.prefix.steps)
            name = str(node.prefix.steps[-1]) if depth else BASE
            seconds = costs.seconds(node.prefix.steps[-1]) if depth else None
            cost = "" if seconds is None else f"  {seconds:.1f} s"
            yield f"{'  ' * depth}{name if node.wanted else f'({name})'}{cost}"


def longest_first(uses: Sequence[Composition], cost: Callable[[Step | None], float]) -> list[int]:
    """Return the indices of `uses` depth first, among siblings the longest subtree first.

    `uses` has the composition of each test; `cost` returns the seconds of a step, or of an evaluation for None.
    """
    total: dict[Composition, float] = {}
    place: dict[Composition, int] = {}
    for use in uses:
        way: list[Composition] = []
        for prefix in use.prefixes():
            way.append(prefix)
            if prefix not in total:
                total[prefix], place[prefix] = 0.0, len(place)
                for state in way:
                    total[state] += cost(prefix.steps[-1])
            total[prefix] += cost(None)
    return sorted(range(len(uses)), key=lambda i: [(-total[state], place[state]) for state in uses[i].prefixes()])


class Remaining:
    """Tracks which states the remaining tests need, in any order of tests."""

    def __init__(self, uses: Sequence[Composition], reads: Reads = reads_none) -> None:
        """Count the states that `uses`, the compositions of all tests, need."""
        self._reads = reads
        self._left = Counter(state for composition in uses for state in needed(composition, reads))

    def done(self, composition: Composition) -> tuple[Composition, ...]:
        """Remove one use of `composition`; return the states that no test needs any more."""
        states = needed(composition, self._reads)
        self._left.subtract(states)
        return tuple(state for state in states if self._left[state] <= 0)

    def needs(self, state: Composition) -> bool:
        """Return whether a remaining test needs `state`."""
        return self._left[state] > 0


class Planned(NamedTuple):
    """The ids of the compositions that a run tests, over all shards."""

    tested: tuple[str, ...]
    judged: tuple[str, ...]
    """Tested compositions with gates."""
