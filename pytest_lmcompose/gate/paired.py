"""Paired gates: whether a composition is worse than another state, or an earlier run, on the same samples.

All paired gates of a run are one family: Holm's correction keeps the chance of any false alarm in the
run at alpha. A gate is judged when its test runs, with the gates that are not known yet counted as if
they alarmed nothing; when the run is over, all of them are judged again together, which may only add
alarms. Imports numpy and scipy with the first comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluators.measurement import EvaluationError, Measurement, expm1
from pytest_lmcompose.gate.repeats import Link, evened, link_of, side_by_side
from pytest_lmcompose.results import Paired

if TYPE_CHECKING:
    from evaluators.significance import Alternative

POWER = 0.8
BASE_MODEL = "the base model"
LEVEL = 0.05
"""Of the drop that a gate without a level of its own tells from noise."""


class Change(NamedTuple):
    """What a metric lost from a reference to a state, in the metric's unit."""

    drop: float
    """Positive where it got worse."""
    stderr: float | None
    p: float
    test: str
    n: int
    worse: tuple[int, ...]
    """Places of the samples that got worse."""


def change(
    runs: Sequence[Measurement], base: Sequence[Measurement], name: str, alternative: Alternative = "worse"
) -> Change:
    """Compare the measurements of one metric, one a repeat, with those of a reference, called `name`.

    Paired as by `compare_with_base`. Raises EvaluationError like it.
    """
    from evaluators.significance import compare

    before, after, clusters, link = _matched(runs, base, name)
    better = runs[0].higher_is_better
    found = compare(before, after, higher_is_better=better, clusters=clusters, alternative=alternative)
    value = sum(m.value for m in base) / len(base)
    worse = (i for i, (x, y) in enumerate(zip(before, after, strict=True)) if (y < x if better else y > x))
    stderr = _error_in_unit(found.stderr, value, link)
    return Change(_in_unit(found.drop, value, link, better), stderr, found.p, found.test, found.n, tuple(worse))


def compare_with_base(
    runs: Sequence[Measurement],
    base: Sequence[Measurement],
    alpha: float,
    gates: int,
    name: str = BASE_MODEL,
) -> tuple[Paired, float]:
    """Compare the measurements of one metric, one a repeat, with those of a reference, called `name`.

    Returns the comparison, with p not yet corrected, and the reference's value. Where the reference
    answers alike in all repeats, these ask the same questions: the answers to each are averaged.
    Else the samples of all repeats stand side by side; so the drop is one on these edits. Samples of
    one cluster count as one unit.

    Raises EvaluationError for samples that cannot be paired, or that do not make the metric's value.
    """
    from evaluators.significance import MCNEMAR, compare

    matched = _matched(runs, base, name)
    before, after, clusters, link = matched
    better = runs[0].higher_is_better
    found = compare(before, after, higher_is_better=better, clusters=clusters)
    value = sum(m.value for m in base) / len(base)
    paired = Paired(
        found.test,
        found.n,
        _in_unit(found.drop, value, link, better),
        _error_in_unit(found.stderr, value, link),
        found.p,
        found.p,
        gates,
        _smallest(matched, value, better, alpha / gates),
        POWER,
        alpha / gates,
        len(set(clusters or ())),
        _smallest_p(before, better) if found.test == MCNEMAR else 0.0,
        not better,
    )
    return paired, value


def is_exact(runs: Sequence[Measurement], base: Sequence[Measurement]) -> bool:
    """Say whether a metric is read off the weights, such as bits, and not sampled: then any change is one."""
    both = (*runs, *base)
    return all(m.stderr == 0 for m in both) and any(m.n == 1 or _link(m) is None for m in both)


def noise_floor(runs: Sequence[Measurement], base: Sequence[Measurement], name: str = BASE_MODEL) -> float | None:
    """Return the smallest drop from a reference that these samples tell from noise, at `LEVEL`.

    None: no drop is. Raises EvaluationError like `compare_with_base`.
    """
    value = sum(m.value for m in base) / len(base)
    return _smallest(_matched(runs, base, name), value, runs[0].higher_is_better, LEVEL)


def corrected(p_values: Sequence[float], gates: int) -> list[float]:
    """Return p-values after Holm's correction for `gates`, those not given counted as 1."""
    from evaluators.significance import holm

    return holm([*p_values, *[1.0] * (gates - len(p_values))])[: len(p_values)]


def describe(paired: Paired) -> str:
    """Return what a verdict says of its comparison."""
    error = "unknown" if paired.stderr is None else f"{paired.stderr:.3g}"
    units = f" in {paired.clusters} groups" if paired.clusters else ""
    what = "rise" if paired.rises else "drop"
    return (
        f"p = {paired.p:.3g}, after Holm over {paired.gates} gate{'s' * (paired.gates != 1)} {paired.p_holm:.3g} "
        f"({paired.test}, n = {paired.n}{units}, {what} {paired.drop:.4g} with standard error {error}; "
        f"{finds(paired.smallest_drop, paired.power, paired.level, what)})"
    )


def finds(smallest: float | None, power: float = POWER, level: float = LEVEL, what: str = "drop") -> str:
    """Return what a verdict says of the smallest drop, or rise, that it finds; None: it finds none."""
    drops = f"no {what}" if smallest is None else f"{what}s from {smallest:.3g}"
    return f"finds {drops} with {power:.0%} power at level {level:.3g}"


class _Matched(NamedTuple):
    """Samples of a reference and of a state, in pairs."""

    before: list[float]
    after: list[float]
    clusters: tuple[int, ...] | None
    link: Link


def _matched(runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> _Matched:
    """Pair the samples of all repeats, see `compare_with_base`."""
    if len(base) != len(runs) or not base:
        raise EvaluationError(f"{name} was measured in {len(base)} of {len(runs)} repeats")
    links = {_link(m) for m in (*base, *runs)}
    link = links.pop()
    if links or link is None:
        raise EvaluationError("the samples do not average to the value")
    for one, other in zip(base, runs, strict=True):
        if len(one.samples) != len(other.samples):
            raise EvaluationError(f"{len(one.samples)} samples of {name} against {len(other.samples)}")
        if tuple(one.weights) != tuple(other.weights):
            raise EvaluationError(f"the samples count differently for {name}")
        if tuple(one.clusters) != tuple(other.clusters):
            raise EvaluationError(f"the samples are grouped differently for {name}")
    before, after = ([evened(m.samples, m.weights) for m in group] for group in (base, runs))
    # The base model is the same in all repeats. Another reference is not: where its repeats may have asked
    # the same, they are taken to have, which leaves no fewer units independent than there are.
    alike = {(x if name == BASE_MODEL else len(x), m.clusters) for x, m in zip(before, base, strict=True)}
    if len(alike) == 1:
        old, new = ([math.fsum(row) / len(row) for row in zip(*group, strict=True)] for group in (before, after))
        return _Matched(list(before[0]) if name == BASE_MODEL else old, new, base[0].clusters or None, link)
    clusters = side_by_side([(len(m.samples), m.clusters) for m in base])
    return _Matched(
        [x for group in before for x in group], [x for group in after for x in group], clusters or None, link
    )


def _link(measurement: Measurement) -> Link | None:
    return link_of(measurement.value, evened(measurement.samples, measurement.weights))


def _smallest(matched: _Matched, base: float, higher_is_better: bool, alpha: float) -> float | None:
    """Return the smallest drop that is found, in the metric's unit; None for one beyond all numbers too."""
    from evaluators.significance import smallest_drop

    before, after, clusters, link = matched
    found = smallest_drop(before, after, higher_is_better=higher_is_better, alpha=alpha, power=POWER, clusters=clusters)
    drop = math.inf if found is None else _in_unit(found, base, link, higher_is_better)
    return drop if math.isfinite(drop) else None


def _error_in_unit(error: float | None, base: float, link: Link) -> float | None:
    """Return the standard error of a drop of the samples' mean as one of the metric, to first order."""
    if error is None or link != "exp":
        return error
    return error * base if math.isfinite(error * base) else None


def _smallest_p(before: Sequence[float], higher_is_better: bool) -> float:
    """Return the p of McNemar's test where every right answer is lost; 0 where there is none, so that none can be."""
    right = sum(x == higher_is_better for x in before)
    return 0.5**right if right else 0.0


def _in_unit(drop: float, base: float, link: Link, higher_is_better: bool) -> float:
    """Return a drop of the samples' mean as one of the metric, whose base value is given."""
    if link != "exp":
        return drop
    return base * (-expm1(-drop) if higher_is_better else expm1(drop))
