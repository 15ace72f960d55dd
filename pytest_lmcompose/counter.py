"""Count the measured compositions of a run, and estimate the remaining time."""

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
        """Compositions to measure, without reference states; empty if unknown."""
        self._each = repeats
        self._over = Count[Composition]()
        """Finished repeats by composition."""
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
        """Count all repeats of `composition` as finished."""
        if composition in self.expected:
            self._over[composition] = self._each

    @property
    def bar(self) -> str:
        """A progress bar by tqdm; empty if the number of compositions is unknown."""
        if not self.expected:
            return ""
        from tqdm import tqdm

        done = self._over.total() / self._each
        return str(
            tqdm.format_meter(done, len(self.expected), 0, ascii=True, bar_format="{percentage:3.0f}%|{bar:10}|")
        )

    def __str__(self) -> str:
        """Return for example `[3/7], about 2 min 5 s left`; without the time, or empty, if unknown."""
        total, over = len(self.expected), self._over.total()
        if not total:
            return ""
        left = (total * self._each - over) * self._seconds / self._worked if self._worked else 0.0
        return f"[{over / self._each:.3g}/{total}]" + (f", about {duration(left)} left" if left > 0 else "")
