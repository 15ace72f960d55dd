"""Pool metrics: one decision over the samples of all metrics that a rule applies to (`pool: true`).

A pool is judged like a metric of its own. Every sample counts the same, so right or wrong answers make a stratified
McNemar test (Mantel and Haenszel 1959): each pair is a stratum. Metrics of other units, or with the other direction,
are pools of their own. Only if a pool fails, its metrics are tested one by one. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from evaluators.measurement import EvaluationError, Measurement, exp, total
from evaluators.metrics import find_metric
from pytest_lmcompose.gate.paired import change, corrected
from pytest_lmcompose.gate.repeats import evened, find, link_of
from pytest_lmcompose.gate.thresholds import Bound, Rule, rules_for
from pytest_lmcompose.results import Member

_POOLED = "pooled over "
"""Start of the note of a metric whose samples are those of others."""


class Pool(NamedTuple):
    """A bound on several metrics together."""

    name: str
    """The rule's glob."""
    bound: Bound
    metrics: tuple[str, ...]
    """One metric is no pool, but judged by itself."""


def pools(rules: Sequence[Rule], measured: Iterable[Measurement]) -> Iterator[Pool]:
    """Yield what the pooling bounds among the rules of one composition decide on."""
    groups: dict[tuple[Rule, Bound, str, bool], list[Measurement]] = {}
    if not any(bound.pool for rule in rules for bound in rule.bounds):
        return
    for m in measured:
        for rule in rules_for(rules, m.metric):
            for bound in rule.bounds:
                if bound.pool:
                    unit = find_metric(m.metric, higher_is_better=m.higher_is_better).unit
                    groups.setdefault((rule, bound, unit, m.higher_is_better), []).append(m)
    for (rule, bound, *_), found in groups.items():
        names = {m.metric for m in found}
        kept = tuple(m.metric for m in found if not _counted(m, names))
        yield Pool(rule.metric, dataclasses.replace(bound, pool=False), kept)


def pooled(name: str, members: Sequence[Measurement], task_of: Callable[[str], str]) -> Measurement:
    """Return the samples of several metrics as one metric.

    Metrics over the same units, such as the same edits, make one cluster of each unit. `task_of` names the task of a
    metric that no evaluator describes. Raises EvaluationError for metrics that are not all means, or all perplexities.
    """
    samples = [evened(m.samples, m.weights) for m in members]
    links = {link_of(m.value, of) for m, of in zip(members, samples, strict=True)}
    if len(links) > 1 or None in links:
        raise EvaluationError(f"{', '.join(m.metric for m in members)} cannot be pooled: not all are means")
    starts: dict[tuple[str, str, int], int] = {}
    labels: list[int] = []
    weights: list[float] = []
    for m in members:
        of_member = m.clusters or range(len(m.samples))
        units = len(set(of_member))
        start = starts.setdefault((*_asked(m, task_of), units), max(labels, default=-1) + 1)
        labels += [start + label for label in of_member]
        scale = len(m.samples) / total(m.weights) if m.weights else 1.0
        weights += [weight * scale for weight in m.weights or (1.0,) * len(m.samples)]
    found = Measurement.mean(
        name,
        [sample for m in members for sample in m.samples],
        higher_is_better=members[0].higher_is_better,
        note=f"{_POOLED}{len(members)} metrics",
        clusters=labels,
        weights=weights if any(m.weights for m in members) else (),
    )
    if any(m.total for m in members):
        share = min(m.level_share for m in members)
        found = dataclasses.replace(found, total=sum(m.total or m.n for m in members), level_share=share)
    if links == {"exp"}:
        value = exp(found.value)
        error = None if found.stderr is None else value * found.stderr
        return dataclasses.replace(found, value=value, stderr=error)
    return found


def pooled_runs(
    pool: Pool, runs: Sequence[Sequence[Measurement]], task_of: Callable[[str], str]
) -> list[tuple[Measurement]]:
    """Return each repeat with nothing but the pool; repeats that lack one of its metrics are left out."""
    found = []
    for run in runs:
        members = [m for m in (find(run, metric) for metric in pool.metrics) if m is not None]
        if len(members) == len(pool.metrics):
            found.append((pooled(pool.name, members, task_of),))
    return found


def members(
    pool: Pool,
    runs: Sequence[Sequence[Measurement]],
    base: Sequence[Sequence[Measurement]],
    name: str,
) -> tuple[Member, ...]:
    """Test each metric of a pool by itself, with Holm's correction over them."""
    found = []
    for metric in pool.metrics:
        here, before = ([m for m in (find(run, metric) for run in side) if m is not None] for side in (runs, base))
        found.append((metric, change(here, before, name)))
    adjusted = corrected([test.p for _, test in found])
    return tuple(Member(metric, test.n, test.drop, p) for (metric, test), p in zip(found, adjusted, strict=True))


def of_pool(reasons: Mapping[str, str], pool: Pool) -> dict[str, str]:
    """Return why a pool cannot be compared, from the reasons of its metrics."""
    first = next((metric for metric in pool.metrics if metric in reasons), None)
    return {} if first is None else {pool.name: f"{first}: {reasons[first]}"}


def _counted(measurement: Measurement, names: Collection[str]) -> bool:
    """Return whether others of these metrics have the same samples: a pool of tasks, or the whole of a part."""
    whole, _, part = measurement.metric.partition("/")
    parts = measurement.note.partition(";")[0].removeprefix(_POOLED).split(", ")
    return (bool(part) and whole in names) or any(name in names for name in parts)


def _asked(measurement: Measurement, task_of: Callable[[str], str]) -> tuple[str, str]:
    """Return what a metric is measured on: metrics that agree, and have as many units, have the same units."""
    data = find_metric(measurement.metric, higher_is_better=measurement.higher_is_better).data
    if data == "questions" or measurement.note.startswith("lm-eval "):
        return "questions", measurement.metric.partition("/")[2]
    return data, "" if data else task_of(measurement.metric)
