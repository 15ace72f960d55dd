"""Flips and churn: answers that are right in one state and wrong in another, and answers that differ at all.

Two models of equal accuracy may be right about different questions (Dutta et al. 2024, arXiv 2407.09141). Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluators.measurement import Measurement
from evaluators.metrics import find_metric
from evaluators.registry import FLIPS

_RIGHT_OR_WRONG = frozenset({0.0, 1.0})


def measure_flips(before: Sequence[Measurement], after: Sequence[Measurement]) -> list[Measurement]:
    """Compare the answers of a state with those of the base model, `before`, metric by metric.

    For each metric of right or wrong answers (see `Metric.answers`) with the same samples in both: `flips/METRIC`, the
    share of answers that became wrong or right. For headline metrics also `flips_to_wrong/METRIC`, the share that
    became wrong, and, if the answers are known, `churn/METRIC`, the share with another answer. A broken answer, a NaN,
    is wrong.
    """
    known = {measurement.metric: measurement for measurement in before}
    found: list[Measurement] = []
    for new in after:
        old = known.get(new.metric)
        if old is not None and new.n < new.total:
            old = old.first(new.n)
        if old is not None and _comparable(old, new):
            found += _flips(old, new)
    return found


def _comparable(old: Measurement, new: Measurement) -> bool:
    answers = find_metric(new.metric, higher_is_better=new.higher_is_better).answers
    same = len(old.samples) == len(new.samples) and old.clusters == new.clusters and old.weights == new.weights
    return answers and same and all(x in _RIGHT_OR_WRONG or x != x for m in (old, new) for x in m.samples)


def _flips(old: Measurement, new: Measurement) -> list[Measurement]:
    pairs = [
        (x == new.higher_is_better, y == new.higher_is_better) for x, y in zip(old.samples, new.samples, strict=True)
    ]
    lost, won = [x and not y for x, y in pairs], [y and not x for x, y in pairs]
    kinds = [
        ([x or y for x, y in zip(lost, won, strict=True)], "answers that are right in one of both models only"),
        (lost, "answers that the base model gets right, and this one wrong"),
    ]
    if not find_metric(new.metric, higher_is_better=new.higher_is_better).headline:
        kinds = kinds[:1]  # there may be dozens of tasks
    elif old.answers and new.answers:
        others = [x != y for x, y in zip(old.answers, new.answers, strict=True)]
        kinds.append((others, "answers that are not those of the base model"))
    return [
        Measurement.mean(
            f"{kind}/{new.metric}",
            [float(x) for x in samples],
            higher_is_better=False,
            note=note,
            clusters=new.clusters or None,
            weights=new.weights,
        )
        for kind, (samples, note) in zip(FLIPS, kinds, strict=False)
    ]
