"""Returned: how much of the knowledge that a step removed is back at the end of a composition."""

from __future__ import annotations

import math

from evaluators.measurement import EvaluationError, Measurement, per_unit, ratio_error


def returned(base: Measurement, after: Measurement, end: Measurement) -> Measurement:
    """Return the share of what a step took off a mean, such as an accuracy, that is back at the end.

    `base` is measured before the step, `after` right after it, `end` after the last step:
    (end - after) / (base - after). 0: all stayed away; 1: as much is there as before; lower is
    better. The three are paired by sample, and so is the standard error (delta method, between the
    clusters of the end). Where the step removed nothing there is no share: NaN, which no gate passes.

    Raises EvaluationError for different metrics, different numbers of samples, or values that are no means.
    """
    states = (base, after, end)
    if len({state.metric for state in states}) != 1:
        names = ", ".join(state.metric for state in states)
        raise EvaluationError(f"returned: base, after and end are of different metrics: {names}")
    if len({len(state.samples) for state in states}) != 1 or not base.samples:
        counts = ", ".join(str(len(state.samples)) for state in states)
        raise EvaluationError(f"returned {base.metric}: {counts} samples; measure all states on the same data")
    removed = [before - later for before, later in zip(base.samples, after.samples, strict=True)]
    back = [last - later for last, later in zip(end.samples, after.samples, strict=True)]
    n = len(removed)
    for state in states:
        if not state.is_mean:
            raise EvaluationError(f"returned {base.metric}: its value is not the mean of its samples")
    total = math.fsum(removed)
    share = math.fsum(back) / total if total > 0 else math.nan
    units = per_unit([b - share * r for b, r in zip(back, removed, strict=True)], end.clusters)
    error = ratio_error(units, total) if total > 0 else None
    note = (
        f"{base.value:.3f} before, {after.value:.3f} right after the step, {end.value:.3f} at the end, paired samples"
    )
    if total <= 0:
        note += "; the step removed nothing"
    return Measurement(f"returned/{base.metric}", share, error, n, False, end.samples, note)
