"""A limit on the time of a run. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.plan import Reads, needed


class Budget:
    """Says which compositions still fit into the time, which starts now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds
        self._built: set[Composition] = set()
        self._decided: dict[Composition, bool] = {}

    def fits(self, composition: Composition, costs: Costs, reads: Reads) -> bool:
        """Return whether `composition` can be built and measured in time, going by `costs`; decided once."""
        if composition not in self._decided:
            states = [state for state in needed(composition, reads) if state not in self._built]
            seconds = sum(costs.expected(state.steps[-1]) for state in states) + costs.expected(None)
            self._decided[composition] = self._clock() + seconds <= self._end
            if self._decided[composition]:
                self._built.update(states)
        return self._decided[composition]

    @property
    def left_out(self) -> tuple[Composition, ...]:
        """The compositions that did not fit."""
        return tuple(composition for composition, fitted in self._decided.items() if not fitted)
