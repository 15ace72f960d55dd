"""A measurement: one number about a model state, with its noise and the samples behind it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

_LONGEST_ANSWER = 80


class EvaluationError(Exception):
    """Data or a model that cannot be measured; the message names the file, record or metric."""


@dataclass(frozen=True)
class Measurement:
    """One metric of one model state.

    `samples` are the per-sample outcomes, in the order of the data, so that two states can be
    compared pairwise; `stderr` is the standard error of `value` (None where it cannot be known: for
    n = 1, and for a value that is not finite).
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    samples: tuple[float, ...]
    note: str = ""
    """How it was measured, where a reader could be misled: window, batch, templates."""
    weights: tuple[float, ...] = ()
    """How much each sample counts in the value, such as the tokens of a window; empty: all alike."""
    clusters: tuple[int, ...] = ()
    """A label a sample: samples of one cluster are no independent units; empty: every sample is one."""
    answers: tuple[str, ...] = ()
    """What the model said to each sample, see `shown`; empty where it said nothing, or that is not kept."""

    @classmethod
    def mean(
        cls,
        metric: str,
        samples: Sequence[float],
        *,
        higher_is_better: bool = True,
        note: str = "",
        clusters: Sequence[Hashable] | None = None,
        answers: Sequence[str] = (),
        weights: Sequence[float] = (),
    ) -> Measurement:
        """Make the mean of `samples`, by `weights` where there are any, and its standard error.

        Samples of one cluster (several prompts of one edit) are not independent: with
        `clusters`, one label a sample, the error is taken between clusters. One sample per
        cluster, or no clusters, gives the usual error from the sample variance (n - 1).

        Raises EvaluationError for no samples. A NaN sample makes the value NaN, which no gate passes.
        """
        n = len(samples)
        if n == 0:
            raise EvaluationError(f"{metric}: no samples to average; is the data set empty?")
        if weights:
            whole = total(weights)
            value = total(weight * sample for weight, sample in zip(weights, samples, strict=True)) / whole
            deviations = [weight * (sample - value) for weight, sample in zip(weights, samples, strict=True)]
        else:
            whole, value = n, total(samples) / n
            deviations = [sample - value for sample in samples]
        return cls(
            metric,
            value,
            ratio_error(per_unit(deviations, clusters), whole),
            n,
            higher_is_better,
            tuple(samples),
            note,
            tuple(weights),
            _numbered(clusters or ()),
            tuple(answers),
        )

    @property
    def is_mean(self) -> bool:
        """Whether the value is the plain mean of the samples, which there are."""
        if not self.samples:
            return False
        mean = total(self.samples) / len(self.samples)
        return math.isclose(mean, self.value, rel_tol=1e-9, abs_tol=1e-12)


def each_alike(clusters: Sequence[Hashable]) -> tuple[float, ...]:
    """Return weights by which each cluster counts alike, however many samples it has; none where all have as many."""
    sizes = Counter(clusters)
    return tuple(1 / sizes[label] for label in clusters) if len(set(sizes.values())) > 1 else ()


def shown(text: str) -> str:
    """Return an answer of a model as reports keep it: on one line, and not longer than 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ANSWER else line[: _LONGEST_ANSWER - 1] + "…"


def per_unit(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[float]:
    """Return the sum of `values` over each cluster, in order of appearance; without clusters, the values.

    Raises EvaluationError for another number of labels than of values.
    """
    if not clusters:
        return list(values)
    if len(clusters) != len(values):
        raise EvaluationError(f"{len(clusters)} clusters for {len(values)} samples; give one label a sample")
    sums: dict[Hashable, float] = {}
    for label, value in zip(clusters, values, strict=True):
        sums[label] = sums.get(label, 0.0) + value
    return list(sums.values())


def ratio_error(deviations: Collection[float], total: float) -> float | None:
    """Return the standard error of sum(y) / sum(x), by linearisation, over independent units.

    `deviations` are y - ratio * x of each unit and `total` is sum(x); a mean is the case x = 1.
    None where the error cannot be known: for a single unit, and for values that are not finite.
    """
    units = len(deviations)
    if units < 2:
        return None
    error = math.sqrt(units / (units - 1) * math.fsum(d * d for d in deviations)) / total
    return error if math.isfinite(error) else None


def total(values: Iterable[float]) -> float:
    """Return the exact sum; infinite where it overflows, and NaN where infinities of both signs are in it."""
    found = list(values)
    try:
        return math.fsum(found)
    except (OverflowError, ValueError):
        return sum(found)


def exp(x: float) -> float:
    """Return e to the power of x, infinite where that is too large for a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def expm1(x: float) -> float:
    """Return e to the power of x, less 1, infinite where that is too large for a float."""
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def _numbered(labels: Sequence[Hashable]) -> tuple[int, ...]:
    """Return labels as numbers from 0 up; none where every one stands alone."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return tuple(number[label] for label in labels) if len(number) < len(labels) else ()
