"""Slow drift over stored runs: a trend to the worse that no comparison with the last run shows. No torch.

Each metric of each composition is a row of values, the oldest run first. Judged is the one-sided
Mann-Kendall test: of all pairs of runs, how many got worse from the earlier to the later. Its p is
exact, ties too: the chance of so many in a random order of the same values. So where nothing but
independent noise moves a metric about its level, a run raises any alarm at all with a chance of
`LEVEL` at most, after Holm's correction over all rows (simulated, 12 metrics over 10 runs: 0.3 %, with
ties 0.6 %). Where levels themselves wander, each run starting from the one before, it alarms far more
often (65 % for 12 random walks): these did get worse over the runs, though nothing says they go on to.
So drift is flagged and fails no build.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pytest_lmcompose.baseline.compare import incomparable, other_questions
from pytest_lmcompose.gate.paired import corrected
from pytest_lmcompose.results import DriftRow, Report, replace

WINDOW = 10
"""Runs that are looked at, the present one too."""
LEVEL = 0.01
"""Chance of a false alarm in a run."""


def drifts(
    reports: Sequence[Report],
    *,
    judged: Callable[[str, str], bool] = lambda composition, metric: True,
    level: float = LEVEL,
    window: int = WINDOW,
) -> list[DriftRow]:
    """Judge the course of metrics of the last of `reports`, the oldest run standing first.

    `judged` chooses metrics of compositions. Runs of other models are left out, and of each metric those
    that do not have it, or asked something else with the same seed. Fewer than three values are no course.
    """
    if not reports:
        return []
    alike = [report for report in reports[-window:] if incomparable(report.model, reports[-1].model) is None]
    found = list(_courses(alike, judged))
    adjusted = corrected([row.p for row in found], len(found)) if found else []
    return [replace(row, p_holm=p, drifts=p <= level) for row, p in zip(found, adjusted, strict=True)]


def trend_p(losses: Sequence[float]) -> float:
    """Return the one-sided Mann-Kendall p of a growing course: exact, whatever the ties.

    It is the share of the orders of these values with as many pairs that grow, or more; the numbers of
    pairs that fall, over all orders of values with ties, are the coefficients of a q-multinomial.
    """
    n = len(losses)
    falls = sum(losses[i] > losses[j] for i in range(n) for j in range(i + 1, n))
    ways = [1]
    placed = 0
    for tied in Counter(losses).values():
        placed += tied
        ways = _product(ways, _gaussian_binomial(placed, tied))
    return sum(ways[: falls + 1]) / sum(ways)


def _courses(reports: Sequence[Report], judged: Callable[[str, str], bool]) -> Iterator[DriftRow]:
    runs = [(report.by_id, (report.seed, report.repeats)) for report in reports]
    for name, now in runs[-1][0].items():
        known = [(run[name], run[name].by_metric, seeds) for run, seeds in runs if name in run]
        for metric, last in now.by_metric.items():
            if last.value is None or not judged(name, metric):
                continue
            values = tuple(
                found.value
                for record, table, seeds in known
                if (found := table.get(metric)) is not None
                and found.value is not None
                and not (seeds == runs[-1][1] and other_questions(metric, record.data, now.data))
            )
            if len(values) >= 3:
                losses = [-value if last.higher_is_better else value for value in values]
                p = trend_p(losses)
                yield DriftRow(name, metric, values, losses[-1] - losses[0], p, p, False)


def _gaussian_binomial(n: int, k: int) -> list[int]:
    """Return the coefficients of the Gaussian binomial of n over k: how many choices have so many inversions."""
    table = [[1]] + [[] for _ in range(k)]
    for size in range(1, n + 1):
        for chosen in range(min(size, k), 0, -1):
            # The last place is chosen, or not, and then stands behind all that are.
            kept, moved = table[chosen - 1], [0] * chosen + table[chosen] if chosen < size else []
            width = max(len(kept), len(moved))
            table[chosen] = [
                (kept[i] if i < len(kept) else 0) + (moved[i] if i < len(moved) else 0) for i in range(width)
            ]
    return table[k]


def _product(one: Sequence[int], other: Sequence[int]) -> list[int]:
    found = [0] * (len(one) + len(other) - 1)
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            found[i + j] += x * y
    return found
