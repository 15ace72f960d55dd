"""Return of unlearned knowledge by the end of a composition."""

from __future__ import annotations

import math

from evaluators.measurement import EvaluationError, Measurement, per_unit, ratio_error


def returned(base: Measurement, after: Measurement, end: Measurement) -> Measurement:
    """Measure the share of a step's reduction of a mean, such as an accuracy, that is undone at the end.

    The share is (end - after) / (base - after), measured before the step (`base`), right `after` it and
    at the `end`. 0: still removed; 1: all is back; lower is better. Samples are paired, also for the
    standard error (delta method, between clusters). NaN, which fails every gate, if the step removed
    nothing.

    Raises EvaluationError for different metrics or numbers of samples, and for values that are not means.
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
