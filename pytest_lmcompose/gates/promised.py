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
from pytest_lmcompose.gates.thresholds import LOST, PROMISABLE, Bound

if TYPE_CHECKING:
    from pytest_lmcompose.promises import Promise


class Held(NamedTuple):
    """A metric held against what the steps promise of it."""

    passed: bool
    limit: float | None
    """None where the promise is said to be lost."""
    words: str
    """What follows the metric's value in a message."""


def hold(bound: Bound, measurement: Measurement, promises: Sequence[Promise], composition: str) -> Held | None:
    """Judge a metric by `promised` or `lost`; None for `promised`, where no step promises anything of it."""
    found = _kept(bound, measurement, promises, composition)
    if bound.kind != LOST:
        return found and found.held
    if found is not None and not found.held.passed:
        return Held(True, None, f" is lost, as is known: {bound.note} (promised {found.words})")
    said = "no step promises anything of it" if found is None else f"it keeps {found.words}"
    return Held(False, None, f": said to be lost ({bound.note}), but {said}: remove the rule")


class _Kept(NamedTuple):
    held: Held
    words: str
    """What is promised, by which step, and what broke it."""


def _kept(bound: Bound, measurement: Measurement, promises: Sequence[Promise], composition: str) -> _Kept | None:
    what = _what(measurement.metric)
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
        words += f" and broken by {strictest.broken_by}"
        if what != "unlearn":  # which an attack has broken
            words += f": use {composition}+{strictest.step}"
    sign = (">=" if passed else "<") if lower else ("<=" if passed else ">")
    return _Kept(Held(passed, limit, f" {sign} {words}"), words)


def _what(metric: str) -> str | None:
    """Return what steps promise of a metric; None: nothing."""
    named = (name for name in PROMISABLE if metric == name or (name[-1] in "_/" and metric.startswith(name)))
    return next((PROMISABLE[name] for name in named), None)
