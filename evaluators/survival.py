"""Survival: how much of what a step achieved is left at the end of a composition."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from evaluators.measurement import EvaluationError, Measurement, per_unit, ratio_error


def measure_survival(
    after: Measurement, end: Measurement, *, clusters: Sequence[Hashable] | None = None
) -> Measurement:
    """Return the metric at the end over the same metric right after its step: 1 is all of it.

    Where both values are means over the same samples the error is that of a ratio of paired
    samples (delta method), between clusters: `clusters`, one label a sample, else those of the
    metric at the end. For other values, such as perplexities, the two errors are combined as if
    independent, which is too large for states that answer alike. The direction is the metric's own:
    a perplexity survives below 1 better. A metric that was 0 right after its step has nothing to
    survive: NaN, which no gate passes.

    Raises EvaluationError for two metrics, or samples of different numbers.
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


def _combined(after: Measurement, end: Measurement, ratio: float) -> float | None:
    if after.stderr is None or end.stderr is None or not math.isfinite(ratio) or not end.value:
        return None
    return ratio * math.hypot(after.stderr / after.value, end.stderr / end.value)


def _shown(measurement: Measurement) -> str:
    return f"{measurement.value:.6g}"
