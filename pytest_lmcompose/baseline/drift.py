"""Detect slow drift over stored runs, which no comparison with the last run shows. Imports no torch.

Each metric of each composition is a series of values, the oldest run first, judged by the one-sided Mann-Kendall test:
how many pairs of runs got worse from the earlier to the later. Its p is exact, also with ties: the probability of that
many pairs in a random order of the same values (approximated for more than 50 runs). If only independent noise moves
the metrics, the probability of any alarm in a run is at most `LEVEL`, after Holm's correction over all series;
simulated for 12 metrics, it is 0.6 % over 10 runs, also with ties, and 0.9 % over 20 and 60. If the values follow a
random walk, alarms are far more frequent (65 % for 12 random walks): such metrics did get worse, but need not continue
to. So drift is reported, and fails no build.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from pytest_lmcompose.baseline.compare import incomparable, other_questions
from pytest_lmcompose.gate.paired import corrected
from pytest_lmcompose.results import DriftRow, Measured, Report, replace

WINDOW = 10
"""Number of runs, including the current one."""
_EXACT = 50
"""Most values whose p is exact; more take seconds."""
LEVEL = 0.01
"""Probability of any false alarm in a run."""


class Series(NamedTuple):
    """A metric of a composition over runs."""

    composition: str
    metric: str
    higher_is_better: bool
    points: tuple[tuple[int, Measured], ...]
    """Index of the run, and what it measured."""


def drifts(
    reports: Sequence[Report],
    *,
    judged: Callable[[str, str], bool] = lambda composition, metric: True,
    level: float = LEVEL,
    window: int = WINDOW,
) -> list[DriftRow]:
    """Test the metrics of the last of `reports` for drift; the oldest run comes first.

    `judged` selects metrics by composition and metric. A series has at least three values; see `series`.
    """
    found = [_row(entry) for entry in series(reports[-window:], judged) if len(entry.points) >= 3]
    adjusted = corrected([row.p for row in found])
    return [replace(row, p_holm=p, drifts=p <= level) for row, p in zip(found, adjusted, strict=True)]


def trend_p(losses: Sequence[float]) -> float:
    """Return the one-sided Mann-Kendall p of a growing series, also with ties.

    It is the share of all orders of these values with at most as many falling pairs. The numbers of orders by falling
    pairs are the coefficients of a q-multinomial. For more than `_EXACT` values it is the normal approximation.
    """
    n = len(losses)
    falls = sum(losses[i] > losses[j] for i in range(n) for j in range(i + 1, n))
    if n > _EXACT:
        excess = sum(losses[i] < losses[j] for i in range(n) for j in range(i + 1, n)) - falls
        variance = sum(sign * m * (m - 1) * (2 * m + 5) for sign, m in [(1, n), *_ties(losses)]) / 18
        return math.erfc((excess - 1) / math.sqrt(2 * variance)) / 2 if variance else 1.0
    ways = [1]
    placed = 0
    for tied in Counter(losses).values():
        placed += tied
        ways = _product(ways, _gaussian_binomial(placed, tied))
    return sum(ways[: falls + 1]) / sum(ways)


def _ties(values: Sequence[float]) -> Iterator[tuple[int, int]]:
    return ((-1, count) for count in Counter(values).values())


def series(reports: Sequence[Report], judged: Callable[[str, str], bool]) -> Iterator[Series]:
    """Yield the values of each metric of the last of `reports` that is finite and `judged`, where they are comparable.

    Runs of other models are left out, and for each metric runs that lack it, or measured it on different data with the
    same seed.
    """
    if not reports:
        return
    last = reports[-1]
    runs = [(i, run.by_id, _seeds(run)) for i, run in enumerate(reports) if incomparable(run.model, last.model) is None]
    for name, now in last.by_id.items():
        known = [(i, run[name], run[name].by_metric, seeds) for i, run, seeds in runs if name in run]
        for metric, measured in now.by_metric.items():
            if measured.value is None or not judged(name, metric):
                continue
            points = tuple(
                (i, found)
                for i, record, table, seeds in known
                if (found := table.get(metric)) is not None
                and found.value is not None
                and not (seeds == _seeds(last) and other_questions(metric, record.data, now.data))
            )
            yield Series(name, metric, measured.higher_is_better, points)


def _row(found: Series) -> DriftRow:
    values = tuple(measured.number for _, measured in found.points)
    losses = [-value if found.higher_is_better else value for value in values]
    p = trend_p(losses)
    return DriftRow(found.composition, found.metric, values, losses[-1] - losses[0], p, p, False)


def _seeds(report: Report) -> tuple[int, int]:
    return report.seed, report.repeats


def _gaussian_binomial(n: int, k: int) -> list[int]:
    """Return the coefficients of the Gaussian binomial of n over k: the number of choices by inversions."""
    table = [[1]] + [[] for _ in range(k)]
    for size in range(1, n + 1):
        for chosen in range(min(size, k), 0, -1):
            # The last place is chosen, or it is inverted with every chosen one.
            kept, moved = table[chosen - 1], [0] * chosen + table[chosen] if chosen < size else []
            table[chosen] = [sum(pair) for pair in zip_longest(kept, moved, fillvalue=0)]
    return table[k]


def _product(one: Sequence[int], other: Sequence[int]) -> list[int]:
    found = [0] * (len(one) + len(other) - 1)
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            found[i + j] += x * y
    return found
