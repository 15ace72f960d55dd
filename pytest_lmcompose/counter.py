"""How many compositions of a run are measured, and how long the others may take."""

from __future__ import annotations

from collections import Counter as Count

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import duration


class Counter:
    """Counts the compositions of a run that were measured.

    The estimate comes from what measured compositions took themselves. Loading the model, reference states and
    cached results do not count as work that was done.
    """

    def __init__(self, repeats: int = 1) -> None:
        self.expected: frozenset[Composition] = frozenset()
        """Compositions to be measured, others than those that they are compared with; none where that is not known."""
        self._each = repeats
        self._over = Count[Composition]()
        """How many repeats of a composition are over."""
        self._worked = 0
        self._seconds = 0.0

    def measured(self, composition: Composition, seconds: float | None) -> None:
        """Count a repeat of `composition` that took `seconds`; None: it was read from the cache."""
        if composition in self.expected:
            self._over[composition] += 1
            if seconds is not None:
                self._worked += 1
                self._seconds += seconds

    def failed(self, composition: Composition) -> None:
        """Count `composition` as over."""
        if composition in self.expected:
            self._over[composition] = self._each

    @property
    def bar(self) -> str:
        """The share of the work that is done, as tqdm draws it; nothing where the number is not known."""
        if not self.expected:
            return ""
        from tqdm import tqdm

        done = self._over.total() / self._each
        return str(
            tqdm.format_meter(done, len(self.expected), 0, ascii=True, bar_format="{percentage:3.0f}%|{bar:10}|")
        )

    def __str__(self) -> str:
        """Return `[3/7], about 2 min 5 s left`, without the time where it is not known, or nothing at all."""
        total, over = len(self.expected), self._over.total()
        if not total:
            return ""
        left = (total * self._each - over) * self._seconds / self._worked if self._worked else 0.0
        return f"[{over / self._each:.3g}/{total}]" + (f", about {duration(left)} left" if left > 0 else "")
