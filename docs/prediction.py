"""Score predictions of orders against a measured run.

    lmcompose predict --suite=every_pair --json > predictions.json
    pytest compositions --lmcompose-suite=every_pair --lmcompose-json=report.json
    python docs/prediction.py predictions.json report.json

Prints for each promise how many order effects were significant (95 % interval of the paired difference without 0), and
how many of these were predicted rightly, wrongly, or not at all.

    python docs/prediction.py --again report.json report-of-another-seed.json

Prints how many of the effects that were significant in one run are so again in the other one: no prediction can be
right more often than runs agree.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from findings import OPEN, Effect, estimate
from scipy import stats

from pytest_lmcompose.baseline.storage import read_run
from pytest_lmcompose.results import Report

METRICS = {
    "edit": ("edit_success_margin", 1),
    "unlearn": ("accuracy/hazardous", -1),
    "perplexity": ("perplexity", -1),
    "recall": ("recall", 1),
    "bits": ("average_bits", -1),
}
"""The metric of each promise, and whether more is better."""
RIGHT, WRONG, UNTOLD = "right", "wrong", "cannot tell"
SAME, OPPOSITE, UNCLEAR = "same sign", "opposite sign", "not significant"


class Scored(NamedTuple):
    """A significant order effect, and what was predicted."""

    promise: str
    order: str
    """The better order, as measured."""
    value: float
    result: str


def score(pairs: Sequence[Mapping[str, Any]], report: Report) -> Iterator[Scored]:
    """Yield the significant effects among those that were measured in both orders."""
    for pair in pairs:
        orders = (f"{pair['first']}+{pair['second']}", f"{pair['second']}+{pair['first']}")
        for prediction in pair["predictions"]:
            metric, sign = METRICS[prediction["promise"]]
            value = difference(metric, {orders[0]: sign, orders[1]: -sign}, report)
            if value:
                better = orders[value < 0]
                told = prediction["better"]
                result = UNTOLD if told is None else RIGHT if told == better else WRONG
                yield Scored(prediction["promise"], better, abs(value), result)


def difference(metric: str, terms: Mapping[str, float], report: Report) -> float | None:
    """Return the sum of a metric times `terms` over compositions; 0 if it is not significant, None if not measured."""
    if metric == METRICS["bits"][0]:  # read, not sampled
        known = report.by_id
        if any(name not in known or metric not in known[name].by_metric for name in terms):
            return None
        return sum(factor * (known[name].by_metric[metric].value or 0.0) for name, factor in terms.items())
    found = estimate(Effect(metric, metric, terms), report)
    return None if found is None else 0.0 if found.verdict == OPEN else found.value


def again(one: Report, other: Report) -> Iterator[tuple[str, str, str]]:
    """Yield promise, orders, and what the other run says, of each significant effect that it has measured too."""
    names = [name.split("+") for name in one.by_id if name.count("+") == 1]
    for first, second in (name for name in names if name[::-1] in names and name < name[::-1]):
        orders = (f"{first}+{second}", f"{second}+{first}")
        for promise, (metric, _) in METRICS.items():
            terms = dict(zip(orders, (1, -1), strict=True))
            value, repeated = (difference(metric, terms, report) for report in (one, other))
            if value and repeated is not None and promise != "bits":
                result = SAME if value * repeated > 0 else OPPOSITE
                yield promise, ", ".join(orders), result if repeated else UNCLEAR


def interval(right: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper and Pearson)."""
    found = stats.binomtest(right, n).proportion_ci(0.95, "exact")
    return float(found.low), float(found.high)


def rows(scored: Sequence[Scored]) -> Iterator[tuple[str, ...]]:
    """Yield promise, significant effects, right, wrong, cannot tell, and the share of right ones among those told."""
    for promise in (*METRICS, "all but bits"):
        own = [s for s in scored if s.promise == promise or (promise == "all but bits" and s.promise != "bits")]
        count = Counter(s.result for s in own)
        told = count[RIGHT] + count[WRONG]
        low, high = interval(count[RIGHT], told) if told else (0.0, 1.0)
        share = f"{count[RIGHT] / told:.2f} ({low:.2f} to {high:.2f})" if told else "-"
        yield promise, str(len(own)), *(str(count[result]) for result in (RIGHT, WRONG, UNTOLD)), share


def print_again(reports: Sequence[str]) -> None:
    """Print how many effects of each promise the second report repeats."""
    found = list(again(*(read_run(Path(report)) for report in reports)))
    count = Counter((promise, result) for promise, _, result in found)
    for promise in dict.fromkeys(promise for promise, _, _ in found):
        print(promise, *(f"{result}: {count[promise, result]}" for result in (SAME, OPPOSITE, UNCLEAR)), sep="; ")
    for one in found:
        print(*one, sep=": ")


if __name__ == "__main__":
    if sys.argv[1] == "--again":
        print_again(sys.argv[2:])
        sys.exit()
    found = [
        scored
        for predictions, report in zip(sys.argv[1::2], sys.argv[2::2], strict=True)
        for scored in score(json.loads(Path(predictions).read_text("utf-8"))["pairs"], read_run(Path(report)))
    ]
    for line in (("promise", "significant", RIGHT, WRONG, UNTOLD, "right of those told"), ("---",) * 6, *rows(found)):
        print("| " + " | ".join(line) + " |")
    for one in found:
        print(f"{one.promise}: {one.order} is better by {one.value:.3g}: {one.result}")
