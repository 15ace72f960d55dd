"""Runs of pytest-xdist: which worker tests what, which GPUs it sees, what becomes of a test that kills it.

Imports xdist, so it is imported only where a run is distributed by it; imports no torch.

A worker takes a whole subtree of the plan, so that states stay where they were built: the one expected to take
longest first. Who has none left takes over the far end of what another worker still has before it, cut where
both are soonest done; what the end would have to build again counts. With a store, a state that several workers
start from is built by one of them, while the others wait; without one, each builds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, cast

import execnet
import pytest
from xdist.scheduler import LoadScheduling, LoadScopeScheduling

from pytest_lmcompose import shadow
from pytest_lmcompose.composition import Composition, CompositionError, parse
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.distribute.gpus import VISIBLE, share_of, visible_gpus
from pytest_lmcompose.options import Options, asked_for_distribution
from pytest_lmcompose.plan import longest_first

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import Scheduling
    from xdist.workermanage import WorkerController

    from pytest_lmcompose.session import Session

AHEAD = 2
"""Tests that a worker has before it: it starts one when it knows the next."""
OTHER_SECONDS = 0.1
"""What a test without a composition is taken to need."""


class Workers:
    """The hooks of xdist, on the controller."""

    def __init__(self, session: Callable[[], Session], options: Callable[[], Options]) -> None:
        """Ask for `session` and `options` when they are needed: the first hook is called before there is one."""
        self._session, self._options = session, options

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_auto_num_workers(self) -> int | None:
        """Return how many workers the GPUs are enough for; None leaves it to xdist."""
        if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
            return None
        each, gpus = self._gpus()
        return len(gpus) // each if gpus else None

    def pytest_xdist_setupnodes(self, specs: list[execnet.XSpec]) -> None:
        """Show each worker of this machine GPUs of its own; a worker that replaces it sees the same."""
        each, gpus = self._gpus()
        if not gpus or self._options().device.startswith("cuda:"):  # that number is one of all GPUs
            return
        for worker, spec in enumerate(specs):
            if spec.popen and VISIBLE not in spec.env:
                pinned = execnet.XSpec(f"{spec}//env:{VISIBLE}={','.join(share_of(gpus, worker, each))}")
                pinned.id = spec.id
                specs[worker] = pinned

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> Scheduling | None:
        """Schedule by prefixes, unless the user chose a distribution by --dist or -d."""
        if asked_for_distribution(config):
            return None
        return cast("Scheduling", Undecided(config, log, self._session))

    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Note in the run's report what the crash of a worker left without a result."""
        composition = composition_of(crashitem)
        if composition is not None:
            self._session().crashed(composition, str(report.longrepr))

    def _gpus(self) -> tuple[int, tuple[str, ...]]:
        """Return the GPUs of a worker, and all of them; none where the run is not to use them, or pin workers."""
        options = self._options()
        each = options.gpus_per_worker
        if each == 0 or options.device in ("cpu", "mps"):
            return each, ()
        gpus = visible_gpus(os.environ)
        if options.device.startswith("cuda:"):
            return 1, gpus[:1]
        if 0 < len(gpus) < each:
            raise pytest.UsageError(f"--lmcompose-gpus-per-worker={each}: only {len(gpus)} can be seen here")
        return each, gpus


def composition_of(nodeid: str) -> Composition | None:
    """Return the composition among the parameters in a test's node id, or None."""
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
    """Return the names of all methods; none where other packages hide ours, so that no test is about a composition."""
    if shadow.hidden() is not None:
        return ()
    from interventions.registry import methods

    return methods()


class Undecided:
    """Schedules as xdist does by itself, unless compositions are among the tests: then `PrefixScheduling` does.

    What the tests are is known when the first worker has collected them, long after xdist asks for a scheduler.
    """

    def __init__(self, config: pytest.Config, log: Producer | None, session: Callable[[], Session]) -> None:
        self._config, self._log, self._session = config, log, session
        self._chosen: Any = LoadScheduling(config, log)
        self._decided = False

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Take note of what a worker collected, and choose if it is the first."""
        if not self._decided:
            self._decided = True
            if any(composition_of(nodeid) is not None for nodeid in collection):
                session, nodes = self._session(), self._chosen.nodes
                shared = session.options.cache_dir is not None
                self._chosen = PrefixScheduling(self._config, self._log, session.costs(), shared)
                for known in nodes:
                    self._chosen.add_node(known)
        self._chosen.add_node_collection(node, collection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chosen, name)


class PrefixScheduling(LoadScopeScheduling):  # type: ignore[misc]  # which has no types
    """Sends each worker its tests one by one, and never one a second time."""

    def __init__(self, config: pytest.Config, log: Producer | None, costs: Costs, shared: bool) -> None:
        """Expect of tests what `costs` knows; `shared` says whether workers read each other's states."""
        super().__init__(config, log)
        self.collection: list[str] | None = None
        self._shared = shared
        self._cost = costs.expected
        self._compositions: dict[str, Composition | None] = {}
        self._place: dict[str, int] = {}
        self._free: list[list[str]] = []
        """Lanes that no worker has taken, in the order in which they are."""
        self._lane: dict[WorkerController, list[str]] = {}
        """What each worker will be sent, if no other takes it over."""
        self._built: set[Composition] = set()
        """States that are in the store."""

    def schedule(self) -> None:
        """Send work to the workers that are ready for it; called again for each that replaces another."""
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return  # which xdist reports
            collection: list[str] = next(iter(self.registered_collections.values()))
            self.collection = collection
            self._place = {nodeid: place for place, nodeid in enumerate(collection)}
            self._compositions = {nodeid: composition_of(nodeid) for nodeid in collection}
            self.workqueue.update((nodeid, {nodeid: False}) for nodeid in self._place)
            self._free = self._lanes()
        for ahead in range(1, AHEAD + 1):  # a lane for each before anybody's second test
            for node in self.nodes:
                self._fill(node, ahead)

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Take note of what a worker collected; one that came later and found something else is not used."""
        super().add_node_collection(node, collection)
        if node not in self.registered_collections:
            node.shutdown()

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        """Send a worker that is through with a test another one."""
        nodeid = self.registered_collections[node][item_index]
        del self.assigned_work[node][nodeid]
        composition = self._compositions[nodeid]
        if self._shared and composition is not None:
            self._built.update(composition.prefixes())
        self._fill(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Give what a worker has not begun back, and return the test that it died in.

        That one is over: it failed.
        """
        sent = list(self.assigned_work.pop(node))
        crashed, waiting = (sent[0], sent[1:]) if sent else (None, [])
        self.workqueue.update((nodeid, {nodeid: False}) for nodeid in waiting)
        if lane := [*waiting, *self._lane.pop(node, [])]:
            self._free.insert(0, lane)
        return crashed

    def _fill(self, node: WorkerController, ahead: int = AHEAD) -> None:
        """Send a worker tests until it has `ahead` of them before it, or none is left for it."""
        if node.shutting_down or node not in self.registered_collections:
            return
        sent = self.assigned_work[node]
        while len(sent) < ahead:
            lane = self._lane.get(node) or (self._free.pop(0) if self._free else self._take_over(node))
            if not lane:
                node.shutdown()  # after what it was sent
                return
            nodeid, *self._lane[node] = lane
            sent[nodeid] = self.workqueue.pop(nodeid)
            node.send_runtest_some([self._place[nodeid]])

    def _lanes(self) -> list[list[str]]:
        """Return the tests in lanes: the base model's, then a subtree each, then other tests by module."""
        of_tests = {nodeid: c for nodeid, c in self._compositions.items() if c is not None}
        nodeids = list(of_tests)
        order = longest_first(list(of_tests.values()), self._cost)
        subtrees = groupby((nodeids[i] for i in order), key=lambda nodeid: of_tests[nodeid].steps[:1])
        others = (nodeid for nodeid in self._compositions if nodeid not in of_tests)
        modules = groupby(others, key=lambda nodeid: nodeid.partition("::")[0])
        return [list(tests) for _, tests in chain(subtrees, modules)]

    def _take_over(self, node: WorkerController) -> list[str]:
        """Return the far end of the lane of the worker that has most before it; nothing where that is no gain."""
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
        """Return where to cut `tests` so that both parts are soonest done, `first` at the earliest.

        That is their number where it is best not to: what would be built twice has to be worth it.
        """
        each = self._each(tests)
        best, ahead, behind = (sum(each), 0, len(tests)), sum(each[:first]), sum(each[first:])
        for cut in range(first, len(tests)):
            shared = _on_both_ways(*(self._compositions[nodeid] for nodeid in tests[cut - 1 : cut + 1])) if cut else ()
            missing = sum(self._cost(state.steps[-1]) for state in shared if state not in self._built)
            twice = 0.0 if self._shared else missing
            best = min(best, (max(ahead, missing + behind) + twice, len(shared), cut))
            ahead, behind = ahead + each[cut], behind - each[cut]
        return best[2]

    def _each(self, tests: Iterable[str]) -> list[float]:
        """Return the seconds that each test takes after the one before it; the first is at its last step."""
        found, before = [], None
        for nodeid in tests:
            composition = self._compositions[nodeid]
            if composition is None:
                found.append(OTHER_SECONDS)
                continue
            there = max(0, len(composition.steps) - 1) if before is None else len(_on_both_ways(before, composition))
            found.append(self._cost(None) + sum(map(self._cost, composition.steps[there:])))
            before = composition
        return found


def _on_both_ways(one: Composition | None, other: Composition | None) -> tuple[Composition, ...]:
    """Return the states that are passed on the way to both."""
    if one is None or other is None:
        return ()
    return tuple(p for p, q in zip(one.prefixes(), other.prefixes(), strict=False) if p == q)
