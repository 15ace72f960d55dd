"""Schedule tests by the prefixes of their compositions. Imports xdist and no torch.

A worker takes a whole subtree of the plan, so states stay where they were built; the longest subtree goes first. An
idle worker steals the end of the longest queue. The cut minimises the time until both are done, including states that
the thief has to build again. With a cache, one worker builds a shared state while the others wait; without a cache,
each worker builds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from itertools import chain, groupby
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadScopeScheduling

from pytest_lmcompose import shadow
from pytest_lmcompose.composition import Composition, CompositionError, parse
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.plan import longest_first

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

AHEAD = 2
"""Number of tests sent to a worker at a time; xdist starts a test only when it knows the next one."""
OTHER_SECONDS = 0.1
"""Estimated duration of a test without a composition."""


def composition_in(nodeid: str) -> Composition | None:
    """Return the composition in the parameters of a test's node id, or None."""
    parts = nodeid.partition("::")[2].partition("[")[2].removesuffix("]").split("-")
    known: Collection[str] | None = None
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            with suppress(CompositionError):
                found = parse("-".join(parts[start : start + length]))
                known = _methods() if known is None else known
                if all(step.method in known for step in found.steps):
                    return found
    return None


def _methods() -> Collection[str]:
    """Return the names of all methods; none if another package hides ours, so no id is a composition."""
    if shadow.hidden() is not None:
        return ()
    from interventions.registry import methods

    return methods()


class PrefixScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Sends tests to workers one at a time, and each test only once."""

    def __init__(self, config: pytest.Config, log: Producer | None, costs: Costs, shared: bool) -> None:
        """Estimate durations from `costs`; `shared` says whether workers share states through a cache."""
        super().__init__(config, log)
        self.collection: list[str] | None = None
        self._shared = shared
        self._cost = costs.expected
        self._compositions: dict[str, Composition | None] = {}
        self._place: dict[str, int] = {}
        self._free: list[list[str]] = []
        """Lanes (queues of tests) that no worker has taken, in the order to take them."""
        self._lane: dict[WorkerController, list[str]] = {}
        """Tests that each worker will get unless another worker steals them."""
        self._built: set[Composition] = set()
        """States that are in the cache."""

    def schedule(self) -> None:
        """Send tests to all workers; xdist calls this again for each replacement worker."""
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return  # xdist reports it
            collection: list[str] = next(iter(self.registered_collections.values()))
            self.collection = collection
            self._place = {nodeid: place for place, nodeid in enumerate(collection)}
            self._compositions = {nodeid: composition_in(nodeid) for nodeid in collection}
            self.workqueue.update((nodeid, {nodeid: False}) for nodeid in self._place)
            self._free = self._lanes()
        for ahead in range(1, AHEAD + 1):  # each worker gets a lane before any gets its second test
            for node in self.nodes:
                self._fill(node, ahead)

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Record the tests that a worker collected; shut down a replacement that collected other tests."""
        super().add_node_collection(node, collection)
        if node not in self.registered_collections:
            node.shutdown()

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        """Send another test to a worker that has finished one."""
        nodeid = self.registered_collections[node][item_index]
        del self.assigned_work[node][nodeid]
        composition = self._compositions[nodeid]
        if self._shared and composition is not None:
            self._built.update(composition.prefixes())
        self._fill(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Return the test that crashed the worker, if any; put its other tests back in the queue."""
        sent = list(self.assigned_work.pop(node))
        crashed, waiting = (sent[0], sent[1:]) if sent else (None, [])
        self.workqueue.update((nodeid, {nodeid: False}) for nodeid in waiting)
        if lane := [*waiting, *self._lane.pop(node, [])]:
            self._free.insert(0, lane)
        return crashed

    def _fill(self, node: WorkerController, ahead: int = AHEAD) -> None:
        """Send tests to a worker until it has `ahead` of them or none are left."""
        if node.shutting_down or node not in self.registered_collections:
            return
        sent = self.assigned_work[node]
        while len(sent) < ahead:
            lane = self._lane.get(node) or (self._free.pop(0) if self._free else self._steal())
            if not lane:
                node.shutdown()  # after it has run the tests it has
                return
            nodeid, *self._lane[node] = lane
            sent[nodeid] = self.workqueue.pop(nodeid)
            node.send_runtest_some([self._place[nodeid]])

    def _lanes(self) -> list[list[str]]:
        """Return lanes of tests: the base model, then each subtree, then tests without compositions by module."""
        of_tests = {nodeid: c for nodeid, c in self._compositions.items() if c is not None}
        nodeids = list(of_tests)
        order = longest_first(list(of_tests.values()), self._cost)
        subtrees = groupby((nodeids[i] for i in order), key=lambda nodeid: of_tests[nodeid].steps[:1])
        others = (nodeid for nodeid in self._compositions if nodeid not in of_tests)
        modules = groupby(others, key=lambda nodeid: nodeid.partition("::")[0])
        return [list(tests) for _, tests in chain(subtrees, modules)]

    def _steal(self) -> list[str]:
        """Remove and return the end of the longest lane; nothing if that would not save time."""
        busy = [other for other in self.nodes if self._lane.get(other)]
        if not busy:
            return []
        before = {other: [*self.assigned_work[other], *self._lane[other]] for other in busy}
        other = max(busy, key=lambda one: sum(self._each(before[one])))
        cut = self._cut(before[other], len(self.assigned_work[other]))
        kept = cut - len(self.assigned_work[other])
        taken, self._lane[other] = self._lane[other][kept:], self._lane[other][:kept]
        return taken

    def _cut(self, tests: Sequence[str], first: int) -> int:
        """Return where to cut `tests`, at `first` or later, so that two workers finish soonest.

        Return `len(tests)` if cutting does not pay, because the second worker has to build states again.
        """
        each = self._each(tests)
        best, ahead, behind = (sum(each), 0, len(tests)), sum(each[:first]), sum(each[first:])
        for cut in range(first, len(tests)):
            shared = _shared_states(*(self._compositions[test] for test in tests[cut - 1 : cut + 1])) if cut else ()
            missing = sum(self._cost(state.steps[-1]) for state in shared if state not in self._built)
            twice = 0.0 if self._shared else missing
            best = min(best, (max(ahead, missing + behind) + twice, len(shared), cut))
            ahead, behind = ahead + each[cut], behind - each[cut]
        return best[2]

    def _each(self, tests: Iterable[str]) -> list[float]:
        """Return the expected seconds of each test after the previous one; the first only has its last step left."""
        found, before = [], None
        for nodeid in tests:
            composition = self._compositions[nodeid]
            if composition is None:
                found.append(OTHER_SECONDS)
                continue
            there = max(0, len(composition.steps) - 1) if before is None else len(_shared_states(before, composition))
            found.append(self._cost(None) + sum(map(self._cost, composition.steps[there:])))
            before = composition
        return found


def _shared_states(one: Composition | None, other: Composition | None) -> tuple[Composition, ...]:
    """Return the common prefixes of two compositions."""
    if one is None or other is None:
        return ()
    return tuple(p for p, q in zip(one.prefixes(), other.prefixes(), strict=False) if p == q)
