"""Measurements of one composition over repeated runs, made one. Imports numpy only where there are several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from evaluators.measurement import Measurement, exp, per_unit, total

if TYPE_CHECKING:
    from pytest_lmcompose.steps import StepRecord

Link = Literal["mean", "exp"]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One run of a composition: its seed, which also chose its edits, and what was found."""

    seed: int
    state_hash: str
    steps: tuple[StepRecord, ...]
    measurements: tuple[Measurement, ...]
    evaluate_seconds: float


def find(measurements: Sequence[Measurement], metric: str) -> Measurement | None:
    """Return the measurement of `metric`, if it is there."""
    return next((m for m in measurements if m.metric == metric), None)


def pooled(runs: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """Return each metric's mean over `runs`, one list a repeat, with all samples in the order of the runs.

    The standard error counts what varies between repeats and between samples. A metric that only some
    repeats have, such as a relation that only some samples of facts hold, is the mean of those.
    """
    if len(runs) == 1:
        return tuple(runs[0])
    names = dict.fromkeys(m.metric for run in runs for m in run)
    return tuple(_pooled([m for run in runs for m in run if m.metric == name], len(runs)) for name in names)


def evened(samples: Sequence[float | None], weights: Sequence[float]) -> tuple[float, ...]:
    """Return samples that count alike: their mean is the weighted one, and its error that of the ratio.

    To first order (linearisation), so that windows of unequal length can be compared and drawn one by
    one. Empty if a sample is not finite, which a report has as None.
    """
    finite = tuple(sample for sample in samples if sample is not None and math.isfinite(sample))
    if len(finite) < len(samples) or not finite or not weights:
        return finite if len(finite) == len(samples) else ()
    whole = math.fsum(weights)
    mean = total(w * x for w, x in zip(weights, finite, strict=True)) / whole
    return tuple(mean + len(finite) * w * (x - mean) / whole for w, x in zip(weights, finite, strict=True))


def link_of(value: float | None, samples: Sequence[float]) -> Link | None:
    """Say how samples that count alike make `value`: their mean, its exponential as in perplexities, or neither."""
    if not samples or value is None or not math.isfinite(value):
        return None
    mean = total(samples) / len(samples)
    if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
        return "mean"
    return "exp" if math.isclose(exp(mean), value, rel_tol=1e-6) else None


def scaled(value: float, samples: Sequence[float]) -> tuple[float, ...]:
    """Return samples that count alike in the unit of their value, to first order; none if they do not make it."""
    link = link_of(value, samples)
    if link is None:
        return ()
    if link == "mean":
        return tuple(samples)
    return tuple(value * (1 + sample - math.log(value)) for sample in samples)


def side_by_side(runs: Sequence[tuple[int, Sequence[int]]]) -> tuple[int, ...]:
    """Return the clusters of the samples of all `runs`, each given by their number and its own clusters.

    No cluster goes over two runs. None, where every sample of every run is its own.
    """
    if not any(clusters for _, clusters in runs):
        return ()
    labels: list[int] = []
    for n, clusters in runs:
        start = max(labels, default=-1) + 1
        labels += [start + label for label in clusters or range(n)]
    return tuple(labels)


def independent(samples: Sequence[float], clusters: Sequence[int]) -> tuple[float, ...]:
    """Return one value a cluster, independent of each other, that have the samples' mean and its error.

    To first order, where clusters differ in size; the samples themselves, where there are no clusters.
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
        weights=tuple(weight for m in found for weight in m.weights),
        answers=tuple(answer for m in found for answer in m.answers) if all(m.answers for m in found) else (),
        clusters=side_by_side([(len(m.samples), m.clusters) for m in found]),
        note="; ".join(filter(None, (found[0].note, note))),
    )
