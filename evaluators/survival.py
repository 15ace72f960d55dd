"""Survival of a step's effect until the end of a composition, and of the first edits of a sequence until its end."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise

from evaluators.measurement import EvaluationError, Measurement, per_unit, ratio_error

_POINTS = 10
"""Largest number of points of the curve over a sequence of edits."""


def measure_survival(
    after: Measurement, end: Measurement, *, clusters: Sequence[Hashable] | None = None
) -> Measurement:
    """Measure a metric at the end divided by its value right after the step.

    If both values are means of the same samples, the error is that of a ratio of paired samples (delta
    method), between `clusters` or those of `end`. For other values, such as perplexities, the errors are
    combined as if independent, which overestimates the error. The direction is that of the metric, so
    lower is better for a perplexity. NaN, which fails every gate, if the metric was 0 after the step.

    Raises EvaluationError for different metrics or numbers of samples.
    """
    if after.metric != end.metric or after.higher_is_better != end.higher_is_better:
        raise EvaluationError(f"survival: {after.metric} right after its step, but {end.metric} at the end")
    if after.n != end.n or len(after.samples) != len(end.samples):
        raise EvaluationError(
            f"survival of {after.metric}: {after.n} samples right after its step, {end.n} at the end; "
            "measure both states on the same data"
        )
    ratio = end.value / after.value if after.value else math.nan
    if after.is_mean and end.is_mean:
        deviations = [later - ratio * before for before, later in zip(after.samples, end.samples, strict=True)]
        units = per_unit(deviations, end.clusters if clusters is None else clusters)
        error = ratio_error(units, math.fsum(after.samples)) if math.isfinite(ratio) else None
        how = "paired samples"
    else:
        error = _combined(after, end, ratio)
        how = "errors combined as if independent"
    note = f"{_shown(end)} at the end over {_shown(after)} right after the step, {how}"
    error = None if error is None else abs(error)
    return Measurement(f"survival/{after.metric}", ratio, error, after.n, after.higher_is_better, end.samples, note)


def measure_sequence(success: Measurement, sizes: Sequence[int]) -> list[Measurement]:
    """Split the success of edits, one sample each, by when they were made: `edit_survival/1-5`, `edit_survival/6-10`.

    `sizes` are the numbers of edits that were made at once, one batch after another. Of more than ten batches, some
    neighbours are taken together. Without a sequence, as with one batch, there is nothing to measure.
    """
    if len(sizes) < 2 or sum(sizes) != success.n:
        return []
    points = min(len(sizes), _POINTS)
    ends = [sum(sizes[: round(len(sizes) * point / points)]) for point in range(points + 1)]
    found = []
    for start, end in pairwise(ends):
        name = f"{start + 1}-{end}" if end > start + 1 else f"{end}"
        note = f"edits {name} of {success.n}, in the order in which they were made, after the last of them"
        answers = success.answers[start:end]
        found.append(Measurement.mean(f"edit_survival/{name}", success.samples[start:end], note=note, answers=answers))
    return found


def _combined(after: Measurement, end: Measurement, ratio: float) -> float | None:
    if after.stderr is None or end.stderr is None or not math.isfinite(ratio) or not end.value:
        return None
    return ratio * math.hypot(after.stderr / after.value, end.stderr / end.value)


def _shown(measurement: Measurement) -> str:
    return f"{measurement.value:.6g}"
