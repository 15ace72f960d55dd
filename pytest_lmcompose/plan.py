"""The plan of a run: the prefix tree of its compositions, the order of work, what it saves and costs.

A state that several compositions start from is one node of the tree, so it is built once. Steps are
the same only with the same settings. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pytest_lmcompose.composition import BASE, Composition, Step
from pytest_lmcompose.costs import Costs


@dataclass(frozen=True)
class Node:
    """One state of the model: the prefix that leads to it, and the states that are built from it."""

    prefix: Composition
    wanted: bool
    """Whether this state is tested itself, and not only passed through."""
    children: tuple[Node, ...] = ()
    """In the order in which they are built."""

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it, each parent before its children, depth first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


@dataclass(frozen=True)
class Plan:
    """A prefix tree of compositions. Equal plans do the same work in the same order."""

    root: Node
    """The base model."""

    @classmethod
    def of(cls, compositions: Iterable[Composition]) -> Plan:
        """Make the plan of the distinct `compositions`; among siblings the given order is kept."""
        wanted = set()
        children: dict[Composition, list[Composition]] = {Composition(): []}
        for composition in compositions:
            wanted.add(composition)
            parent = Composition()
            for prefix in composition.prefixes():
                if prefix not in children:
                    children[prefix] = []
                    children[parent].append(prefix)
                parent = prefix
        nodes: dict[Composition, Node] = {}
        for prefix in sorted(children, key=lambda c: len(c.steps), reverse=True):  # children before parents
            nodes[prefix] = Node(prefix, prefix in wanted, tuple(nodes[child] for child in children[prefix]))
        return cls(nodes[Composition()])

    @cached_property
    def order(self) -> tuple[Composition, ...]:
        """The compositions to test, depth first: each stands behind those it shares a prefix with."""
        return tuple(node.prefix for node in self.root.walk() if node.wanted)

    @cached_property
    def states(self) -> tuple[Composition, ...]:
        """Every state that is built, in that order, the base model left out."""
        return tuple(node.prefix for node in self.root.walk())[1:]

    @property
    def applications(self) -> int:
        """How often a step is applied when each state is built once."""
        return len(self.states)

    @property
    def applications_from_scratch(self) -> int:
        """How often a step would be applied if each composition were built from the base model."""
        return sum(len(composition.steps) for composition in self.order)

    @cached_property
    def last_use(self) -> Mapping[Composition, Composition]:
        """For each state, the last composition of the order that needs it: then its snapshot can go."""
        return {prefix: composition for composition in self.order for prefix in composition.prefixes()}

    def seconds(self, costs: Costs) -> float:
        """Return the expected seconds of all steps and evaluations, as far as `costs` knows them."""
        steps = sum(costs.seconds(state.steps[-1]) or 0.0 for state in self.states)
        return steps + len(self.order) * (costs.evaluation or 0.0)

    def peak_bytes(self, costs: Costs) -> int:
        """Return the most bytes of snapshots that are held at once, as far as `costs` knows them.

        A snapshot adds the tensors that its own step changed and shares the others with the state before.
        """
        held = peak = 0
        live: list[Composition] = []
        for state in self.states:
            # Depth first, only the states on the way to this one are still needed.
            while live and live[-1].steps != state.steps[: len(live[-1].steps)]:
                held -= costs.bytes(live.pop().steps[-1]) or 0
            live.append(state)
            held += costs.bytes(state.steps[-1]) or 0
            peak = max(peak, held)
        return peak

    def lines(self, costs: Costs, repeats: int = 1) -> Iterator[str]:
        """Yield the plan for a reader: what it saves and costs, then the tree, one state a line.

        With `repeats`, all is done so often, one repeat of a composition after the other.
        """
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
            yield "(in brackets: only on the way, not tested)"
        for node in self.root.walk():
            depth = len(node.prefix.steps)
            name = str(node.prefix.steps[-1]) if depth else BASE
            seconds = costs.seconds(node.prefix.steps[-1]) if depth else None
            cost = "" if seconds is None else f"  {seconds:.1f} s"
            yield f"{'  ' * depth}{name if node.wanted else f'({name})'}{cost}"


def longest_first(uses: Sequence[Composition], cost: Callable[[Step | None], float]) -> list[int]:
    """Return the positions of `uses` depth first, of siblings the one whose subtree takes longest first.

    `uses` are the compositions of tests, one a test; `cost` is what a step takes, or for None a measurement.
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
    """Which states the tests that are left still need, whatever order they run in."""

    def __init__(self, uses: Sequence[Composition]) -> None:
        """Count `uses`, one composition a test; a composition may stand there several times."""
        self._left = Counter(prefix for composition in uses for prefix in composition.prefixes())

    def done(self, composition: Composition) -> tuple[Composition, ...]:
        """Take one use of `composition` off, and return the states that nothing needs any more."""
        over = []
        for prefix in composition.prefixes():
            self._left[prefix] -= 1
            if self._left[prefix] <= 0:
                over.append(prefix)
        return tuple(over)

    def needs(self, state: Composition) -> bool:
        """Say whether a test that is left needs `state`."""
        return self._left[state] > 0


class Planned(NamedTuple):
    """The ids of the compositions that a run tests, all shards taken together."""

    tested: tuple[str, ...]
    judged: tuple[str, ...]
    """Those of them whose tests ask for gates."""
