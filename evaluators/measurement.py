"""Measurement: a metric of a model state with its samples and standard error."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import mul

_LONGEST_ANSWER = 80


class EvaluationError(Exception):
    """Data or a model cannot be measured; the message names the file, record or metric."""


@dataclass(frozen=True)
class Measurement:
    """One metric of one model state.

    `samples` are the outcomes in the order of the data, so that two states can be compared in pairs.
    `stderr` is the standard error of `value`; None for n = 1 and for values that are not finite.
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    samples: tuple[float, ...]
    note: str = ""
    """How it was measured, such as window, batch or templates."""
    weights: tuple[float, ...] = ()
    """Weight of each sample in the value, such as the tokens of a window; empty: equal weights."""
    clusters: tuple[int, ...] = ()
    """One label per sample; samples of a cluster are not independent; empty: all are independent."""
    answers: tuple[str, ...] = ()
    """The model's answer to each sample, shortened by `shorten`; empty if not generated or not kept."""
    total: int = 0
    """Number of samples of the whole data, if they are measured in parts; 0: they are measured at once."""
    level_share: float = 1.0
    """Share of a test's level that belongs to the samples so far; those of all parts add up to 1."""

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
        """Return the mean of `samples`, weighted by `weights` if given, with its standard error.

        With `clusters`, one label per sample, the error is computed between clusters: several prompts
        of one edit, for example, are not independent. Otherwise it follows from the sample variance
        (n - 1). A NaN sample makes the value NaN, which fails every gate.

        Raises EvaluationError for no samples.
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

    def with_part(self, part: Measurement) -> Measurement:
        """Return a mean over these samples and those of the next part of the data."""
        both = Measurement.mean(
            self.metric,
            self.samples + part.samples,
            higher_is_better=self.higher_is_better,
            note=part.note,
            answers=self.answers + part.answers if self.answers and part.answers else (),
        )
        return both.part_of(self.total, before=self.n)

    def part_of(self, total: int, before: int = 0) -> Measurement:
        """Return the measurement as one of a part of `total` samples, `before` of which were tested before.

        The share of the level grows with the square of the share of the samples, so the last parts have most of it.
        """
        return dataclasses.replace(self, total=total, level_share=(self.n**2 - before**2) / total**2)

    def first(self, n: int) -> Measurement:
        """Return the mean over the first n samples."""
        found = Measurement.mean(
            self.metric,
            self.samples[:n],
            higher_is_better=self.higher_is_better,
            note=self.note,
            answers=self.answers[:n],
        )
        return dataclasses.replace(found, total=self.total, level_share=self.level_share)

    @property
    def is_mean(self) -> bool:
        """Whether there are samples and the value is their unweighted mean."""
        if not self.samples:
            return False
        mean = total(self.samples) / len(self.samples)
        return math.isclose(mean, self.value, rel_tol=1e-9, abs_tol=1e-12)


def each_alike(clusters: Sequence[Hashable]) -> tuple[float, ...]:
    """Return weights by which every cluster counts the same, whatever its size; none if all have the same size."""
    sizes = Counter(clusters)
    return tuple(1 / sizes[label] for label in clusters) if len(set(sizes.values())) > 1 else ()


def shorten(text: str) -> str:
    """Return a model's answer on one line, cut to 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ANSWER else line[: _LONGEST_ANSWER - 1] + "…"


def per_unit(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[float]:
    """Return the sum of `values` in each cluster, in order of appearance; without clusters, the values.

    Raises EvaluationError if the numbers of labels and values differ.
    """
    if not clusters:
        return list(values)
    if len(clusters) != len(values):
        raise EvaluationError(f"{len(clusters)} clusters for {len(values)} samples; give one label per sample")
    sums: dict[Hashable, float] = {}
    for label, value in zip(clusters, values, strict=True):
        sums[label] = sums.get(label, 0.0) + value
    return list(sums.values())


def ratio_error(deviations: Collection[float], total: float) -> float | None:
    """Return the standard error of sum(y) / sum(x) over independent units, by linearisation.

    `deviations` are y - ratio * x of each unit and `total` is sum(x); for a mean, x = 1.
    None for a single unit and for values that are not finite.
    """
    units = len(deviations)
    if units < 2:
        return None
    error = math.sqrt(units / (units - 1) * math.fsum(map(mul, deviations, deviations))) / total
    return error if math.isfinite(error) else None


def total(values: Iterable[float]) -> float:
    """Return the exact sum; infinite on overflow, NaN for infinities of both signs."""
    found = list(values)
    try:
        return math.fsum(found)
    except (OverflowError, ValueError):
        return sum(found)


def exp(x: float) -> float:
    """Return e**x, or infinity on overflow."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def expm1(x: float) -> float:
    """Return e**x - 1, or infinity on overflow."""
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def _numbered(labels: Sequence[Hashable]) -> tuple[int, ...]:
    """Return labels as numbers from 0; empty if all labels differ."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return tuple(number[label] for label in labels) if len(number) < len(labels) else ()
