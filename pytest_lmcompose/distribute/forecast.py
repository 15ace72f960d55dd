"""Forecast how long a run takes in several workers. Imports xdist, and no torch.

Stand-ins for workers take tests from the run's own scheduler, in simulated time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.distribute.lanes import OTHER_SECONDS, PrefixScheduling, composition_in


class Simulated(NamedTuple):
    """What the workers did."""

    by: dict[str, str]
    """The worker of each test, in order of their starts."""
    built: Counter[Composition]
    """How often each state was built."""
    seconds: float


class _Worker:
    """Stands for xdist's controller of one worker."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.queue: list[int] = []
        self.shutting_down = False
        self.states: tuple[Composition, ...] = ()
        """The states that it holds."""

    @property
    def can_start(self) -> bool:
        """Whether it starts a test: as in xdist, only if it knows what comes next."""
        return len(self.queue) >= 2 or (self.shutting_down and bool(self.queue))

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def forecast(compositions: Iterable[Composition], workers: int, costs: Costs, *, shared: bool = True) -> float:
    """Return the expected seconds until `workers` have tested all compositions, without their start-up.

    `costs` are those of a process that runs beside as many others. `shared`: states are shared through a cache.
    """
    return simulate([f"::[{composition.id}]" for composition in compositions], workers, costs, shared=shared).seconds


def simulate(
    nodeids: Sequence[str],
    workers: int,
    costs: Costs,
    *,
    shared: bool = True,
    expected: Costs | None = None,
    dies: Callable[[str], bool] = lambda nodeid: False,
) -> Simulated:
    """Let workers go through tests that take `costs`, while the scheduler expects `expected`, or the same.

    A worker that dies in a test is replaced, and the test counts as run.
    """
    config: Any = SimpleNamespace(getvalue=lambda name: ["popen"] * workers)
    scheduler: Any = PrefixScheduling(config, None, costs if expected is None else expected, shared)
    names = itertools.count()

    def start() -> _Worker:
        worker = _Worker(f"gw{next(names)}")
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, nodeids)
        if scheduler.collection_is_completed:
            scheduler.schedule()
        return worker

    team = [start() for _ in range(workers)]
    found = Simulated({}, Counter(), 0.0)
    ready: dict[Composition, float] = {}
    """When each state is in the cache."""
    running: dict[_Worker, float] = {}
    """When each busy worker is done."""
    now = 0.0
    while True:
        for worker in team:
            if worker in running or not worker.can_start:
                continue
            nodeid = nodeids[worker.queue[0]]
            composition = composition_in(nodeid)
            end = now
            for state in () if composition is None else composition.prefixes():
                if state in worker.states:
                    continue
                if shared and state in ready:
                    end = max(end, ready[state])
                else:
                    end = ready[state] = end + costs.expected(state.steps[-1])
                    found.built[state] += 1
            worker.states = () if composition is None else composition.prefixes()
            found.by[nodeid] = worker.gateway.id
            running[worker] = end + (OTHER_SECONDS if composition is None else costs.expected(None))
        if not running:
            break
        worker = min(running, key=running.__getitem__)
        now = running.pop(worker)
        place = worker.queue[0]
        if dies(nodeids[place]):
            scheduler.remove_node(worker)
            team[team.index(worker)] = start()
        else:
            worker.queue.pop(0)
            scheduler.mark_test_complete(worker, place)
    return found._replace(seconds=now)
