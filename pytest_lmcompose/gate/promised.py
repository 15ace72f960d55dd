"""Gates on what the steps of a composition promise: values of metrics by their settings, edits made, knowledge gone.

`promised: NUMBER` holds for compositions whose steps promise something of the metric. Where the steps' own settings
say which value, as of `average_bits` and `sparsity`, the number is the slack, as a share; for what a category
promises, as of edits and removed knowledge, it is the bound. A promise that a later step breaks fails like any other.
Where that is known and accepted, `lost: REASON` says so: the gate passes while the promise is lost, and fails once it
holds. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_lmcompose.gate.thresholds import LOST, Bound

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from pytest_lmcompose.gate.promises import Promise


class Held(NamedTuple):
    """A metric held against what the steps promise of it."""

    passed: bool
    limit: float | None
    """None where the promise is said to be lost."""
    words: str
    """What follows the metric's value in a message."""


def hold(bound: Bound, measurement: Measurement, promises: Sequence[Promise], composition: str) -> Held | None:
    """Judge a metric by `promised` or `lost`; None for `promised`, where no step promises anything of it."""
    found = [promise for promise in promises if promise.about(measurement)]
    if not found:
        if bound.kind != LOST:
            return None
        return _not_lost(bound, "no step promises anything of it")
    higher = measurement.higher_is_better
    if valued := [(promise.value, promise) for promise in found if promise.value is not None]:
        value, strictest = (max if higher else min)(valued, key=lambda pair: pair[0])
        limit = value * (1 - bound.value if higher else 1 + bound.value)
    else:
        strictest, limit = next((p for p in found if p.broken_by is None), found[0]), bound.value
    passed = measurement.value >= limit if higher else measurement.value <= limit
    words = f"{limit:.6g}, promised by {strictest.step}"
    if not passed and strictest.broken_by is not None:
        words += f" and broken by {strictest.broken_by}"
    if bound.kind == LOST:
        if passed:
            return _not_lost(bound, f"it keeps {words}")
        return Held(True, None, f" is lost, as is known: {bound.note} (promised {words})")
    if not passed and strictest.broken_by is not None and strictest.value is not None:  # else an attack broke it
        words += f": use {composition}+{strictest.step}"
    sign = (">=" if passed else "<") if higher else ("<=" if passed else ">")
    return Held(passed, limit, f" {sign} {words}")


def _not_lost(bound: Bound, why: str) -> Held:
    return Held(False, None, f": said to be lost ({bound.note}), but {why}: remove the rule")
