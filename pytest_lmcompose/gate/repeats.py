"""Pool the measurements of one composition over repeats. Imports numpy only if there are several repeats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from evaluators.measurement import Measurement, exp, per_unit, total

if TYPE_CHECKING:
    from pytest_lmcompose.steps import StepRecord

Link = Literal["mean", "exp"]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One repeat of a composition; its seed also selected the edits."""

    seed: int
    state_hash: str
    steps: tuple[StepRecord, ...]
    measurements: tuple[Measurement, ...]
    evaluate_seconds: float

    @property
    def partial(self) -> bool:
        """Whether the state was decided before all questions were asked."""
        return any(m.n < m.total for m in self.measurements)


def find(measurements: Sequence[Measurement], metric: str) -> Measurement | None:
    """Return the measurement of `metric`, or None."""
    return next((m for m in measurements if m.metric == metric), None)


def pooled(runs: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """Return the mean of each metric over the repeats `runs`, with the samples of all repeats in order.

    The standard error covers the variation between repeats and between samples. A metric that only some repeats
    measured is averaged over these.
    """
    if len(runs) == 1:
        return tuple(runs[0])
    names = dict.fromkeys(m.metric for run in runs for m in run)
    return tuple(_pooled([m for run in runs for m in run if m.metric == name], len(runs)) for name in names)


def evened(samples: Sequence[float | None], weights: Sequence[float]) -> tuple[float, ...]:
    """Return equally weighted samples with the weighted mean of `samples` and, to first order, its standard error.

    So text windows of unequal length can be paired and resampled. Empty if a sample is not finite (None in reports).
    """
    if None in samples:
        return ()
    finite = cast(tuple[float, ...], tuple(samples))
    if not all(map(math.isfinite, finite)):
        return ()
    if not finite or not weights:
        return finite
    whole = math.fsum(weights)
    mean = total(w * x for w, x in zip(weights, finite, strict=True)) / whole
    return tuple(mean + len(finite) * w * (x - mean) / whole for w, x in zip(weights, finite, strict=True))


def link_of(value: float | None, samples: Sequence[float]) -> Link | None:
    """Return how equally weighted samples give `value`: as their mean, as its exponential (perplexity), or None."""
    if not samples or value is None or not math.isfinite(value):
        return None
    mean = total(samples) / len(samples)
    if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
        return "mean"
    return "exp" if math.isclose(exp(mean), value, rel_tol=1e-6) else None


def scaled(value: float, samples: Sequence[float]) -> tuple[float, ...]:
    """Return equally weighted samples in the unit of `value`, to first order; empty if they do not give it."""
    link = link_of(value, samples)
    if link is None:
        return ()
    if link == "mean":
        return tuple(samples)
    return tuple(value * (1 + sample - math.log(value)) for sample in samples)


def side_by_side(runs: Sequence[tuple[int, Sequence[int]]]) -> tuple[int, ...]:
    """Return cluster labels for the samples of all `runs`, each given as (number of samples, cluster labels).

    No cluster spans two runs. Empty if every sample is independent.
    """
    if not any(clusters for _, clusters in runs):
        return ()
    labels: list[int] = []
    for n, clusters in runs:
        start = max(labels, default=-1) + 1
        labels += [start + label for label in clusters or range(n)]
    return tuple(labels)


def independent(samples: Sequence[float], clusters: Sequence[int]) -> tuple[float, ...]:
    """Return one independent value per cluster, with the samples' mean and standard error.

    To first order if clusters differ in size; without clusters, the samples themselves.
    """
    if not clusters or not samples:
        return tuple(samples)
    mean = total(samples) / len(samples)
    units = per_unit([sample - mean for sample in samples], clusters)
    return tuple(mean + len(units) * unit / len(samples) for unit in units)


def _pooled(found: Sequence[Measurement], repeats: int) -> Measurement:
    from evaluators.significance import error_over_repeats

    value = sum(m.value for m in found) / len(found)
    error = error_over_repeats(
        [m.value for m in found],
        [m.stderr for m in found],
        [independent(scaled(m.value, evened(m.samples, m.weights)), m.clusters) for m in found],
    )
    note = f"mean of {len(found)} repeats" + ("" if len(found) == repeats else f", of {repeats}")
    return dataclasses.replace(
        found[0],
        value=value,
        stderr=error,
        n=sum(m.n for m in found),
        samples=tuple(sample for m in found for sample in m.samples),
        weights=tuple(weight for m in found for weight in m.weights or (1.0,) * len(m.samples))
        if any(m.weights for m in found)
        else (),
        answers=tuple(answer for m in found for answer in m.answers) if all(m.answers for m in found) else (),
        clusters=side_by_side([(len(m.samples), m.clusters) for m in found]),
        note="; ".join(filter(None, (found[0].note, note))),
    )
