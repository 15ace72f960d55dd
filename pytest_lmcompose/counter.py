"""How many compositions of a run are measured, and how long the others may take."""

from __future__ import annotations

import time

from pytest_lmcompose.composition import Composition


class Counter:
    """Counts the compositions of a run that were measured."""

    def __init__(self) -> None:
        self.expected: frozenset[Composition] = frozenset()
        """Compositions to be measured, others than those that they are compared with; none where that is not known."""
        self._began = time.perf_counter()
        self._repeats = 0

    def measured(self, composition: Composition, repeats: int) -> str:
        """Count a repeat of `composition`; return `[3/7], about 2 min left: `, or nothing if that is not known."""
        if composition not in self.expected:
            return ""
        self._repeats += 1
        done, total = self._repeats / repeats, len(self.expected)
        left = (time.perf_counter() - self._began) / done * (total - done)
        return f"[{done:g}/{total}], {_about(left)} left: " if left > 0 else f"[{done:g}/{total}]: "


def _about(seconds: float) -> str:
    """Return a duration as an estimate is read."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
