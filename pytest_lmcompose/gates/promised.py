"""Gates on what the steps of a composition promise: the bits and zeros of their settings, edits made, knowledge gone.

`promised: NUMBER` holds for compositions whose steps promise something of the metric. For `average_bits` and
`sparsity` the steps' own settings say what, and the number is the slack, as a share; for edits and removed knowledge
the number is the bound. A promise that a later step breaks fails like any other. Where that is known and accepted,
`lost: REASON` says so: the gate passes while the promise is lost, and fails once it holds. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluators.measurement import Measurement
from pytest_lmcompose.gates.thresholds import Bound

if TYPE_CHECKING:
    from pytest_lmcompose.promises import Promise

_WHAT = (("average_bits", "bits"), ("sparsity", "sparsity"), ("edit_", "edit"), ("accuracy/", "unlearn"))


class Kept(NamedTuple):
    """Whether a metric keeps what the steps promise of it."""

    passed: bool
    limit: float
    lower: bool
    """Whether the limit is one from below."""
    words: str
    """What is promised, by which step, and what broke it."""


def what_of(metric: str) -> str | None:
    """Return which promises a metric measures; None: none."""
    return next(
        (what for name, what in _WHAT if metric == name or (name[-1] in "_/" and metric.startswith(name))), None
    )


def kept(bound: Bound, measurement: Measurement, promises: Sequence[Promise], composition: str) -> Kept | None:
    """Hold a metric against what is promised of it; None where no step promises anything of it."""
    what = what_of(measurement.metric)
    if what == "unlearn" and measurement.higher_is_better:
        return None  # of knowledge that is to stay
    found = [promise for promise in promises if promise.what == what]
    if not found:
        return None
    lower = measurement.higher_is_better
    if what in ("bits", "sparsity"):
        strictest = (max if lower else min)(found, key=lambda promise: promise.value or 0.0)
        assert strictest.value is not None
        limit = strictest.value * (1 - bound.value if lower else 1 + bound.value)
    else:
        strictest, limit = next((p for p in found if p.broken_by is None), found[0]), bound.value
    passed = measurement.value >= limit if lower else measurement.value <= limit
    words = f"{limit:.6g}, promised by {strictest.step}"
    if not passed and strictest.broken_by is not None:
        words += f" and broken by {strictest.broken_by}: use {composition}+{strictest.step}"
        if what == "unlearn":
            words = words.partition(": use")[0]
    return Kept(passed, limit, lower, words)
