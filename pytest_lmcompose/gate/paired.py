"""Paired tests: is a composition worse than another state, or an earlier run, on the same samples?

All paired gates of a run are one family: Holm's correction limits the chance of any false alarm in the run to alpha.
When a gate is first judged, gates that are still unknown count as passed; at the end of the run all are corrected
together, which can only add alarms. numpy and scipy are imported with the first comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from evaluators.measurement import EvaluationError, Measurement, expm1
from evaluators.metrics import find_metric
from pytest_lmcompose.gate.repeats import Link, evened, link_of, side_by_side
from pytest_lmcompose.results import Evidence, Paired

if TYPE_CHECKING:
    from evaluators.significance import Alternative, Drops

POWER = 0.8
BASE_MODEL = "the base model"
LEVEL = 0.05
"""Significance level of the smallest detectable drop, for gates without a level of their own."""
EFFECT = 0.05
"""Share of the reference whose loss a gate counts the needed samples for, if its rule states no effect."""


class Change(NamedTuple):
    """How much worse a metric is than its reference, in the metric's unit."""

    drop: float
    """Positive if the metric got worse."""
    stderr: float | None
    p: float
    test: str
    n: int
    worse: tuple[int, ...]
    """Indices of the samples that got worse."""
    rounding: float
    """A drop up to this may be rounding."""


def change(
    runs: Sequence[Measurement], base: Sequence[Measurement], name: str, alternative: Alternative = "worse"
) -> Change:
    """Compare a metric with a reference called `name`; both are given by repeat.

    If the reference's answers are the same in all repeats, these ask the same questions, and the answers to each are
    averaged. Otherwise the samples of all repeats are concatenated. Samples of one cluster count as one unit.

    Raises EvaluationError if the samples cannot be paired, or do not average to the metric's value.
    """
    return _change(_pairs(runs, base, name), alternative)


def compare_with_base(
    runs: Sequence[Measurement],
    base: Sequence[Measurement],
    alpha: float,
    gates: int,
    name: str = BASE_MODEL,
    effect: float | None = None,
) -> tuple[Paired, float]:
    """Test whether a metric is worse than its reference; return the comparison and the reference's value.

    `effect` is the loss to count the needed samples for, 5 % of the reference by default. Pairs samples and raises
    EvaluationError like `change`. `p_holm` is not corrected yet, see `corrected`.
    """
    from evaluators.significance import units_needed

    pairs = _pairs(runs, base, name)
    found = _change(pairs, "worse")
    level = alpha / gates * pairs.level_share
    effect = EFFECT * abs(pairs.base) if effect is None else effect
    inner = pairs.in_samples(effect)
    paired = Paired(
        found.test,
        found.n,
        found.drop,
        found.stderr,
        found.p,
        found.p,
        gates,
        _smallest_drop(pairs, level),
        POWER,
        alpha / gates,
        len(set(pairs.clusters or ())),
        _smallest_p(pairs),
        not pairs.higher_is_better,
        effect,
        units_needed(pairs.drops, inner, level, POWER) if 0 < inner < math.inf else None,
    )
    return paired, pairs.base


def evidence_within(
    runs: Sequence[Measurement], base: Sequence[Measurement], margin: float, level: float, name: str, *, percent: bool
) -> tuple[Evidence, float]:
    """Bound how much worse a metric is than its reference; return this with the reference's value.

    `margin` is in the metric's unit, or in percent of the reference. Raises EvaluationError like `change`, and for a
    margin that the reference cannot lose.
    """
    from evaluators.noninferiority import non_inferiority

    pairs = _pairs(runs, base, name)
    amount = margin / 100 * abs(pairs.base) if percent else margin
    inner = pairs.in_samples(amount)
    if not inner > 0 or not math.isfinite(inner):
        raise EvaluationError(f"a loss of {amount:g} is impossible from {pairs.base:g}")
    drops = pairs.drops
    found = non_inferiority(drops, inner, level * pairs.level_share, POWER)
    loss, upper = (x if math.isinf(x) else pairs.in_unit(x) for x in (drops.mean, found.upper))
    return Evidence(drops.test, drops.n, len(drops.sums), loss, upper, amount, level, found.needed), pairs.base


def is_exact(runs: Sequence[Measurement], base: Sequence[Measurement]) -> bool:
    """Return whether a metric is read from the weights, such as bits, and not sampled."""
    both = (*runs, *base)
    return all(m.stderr == 0 for m in both) and any(m.n == 1 or _link(m) is None for m in both)


def noise_floor(runs: Sequence[Measurement], base: Sequence[Measurement], name: str = BASE_MODEL) -> float | None:
    """Return the smallest drop that a paired test of these samples detects at `LEVEL`, None if it detects none.

    Raises EvaluationError like `change`.
    """
    return _smallest_drop(_pairs(runs, base, name), LEVEL)


def corrected(p_values: Sequence[float], gates: int | None = None) -> list[float]:
    """Return p-values after Holm's correction for `gates` tests, their own number by default; missing ones are 1."""
    if not p_values:
        return []
    from evaluators.significance import holm

    return holm([*p_values, *[1.0] * ((gates or 0) - len(p_values))])[: len(p_values)]


def describe(paired: Paired) -> str:
    """Return a comparison as gate messages show it."""
    error = "unknown" if paired.stderr is None else f"{paired.stderr:.3g}"
    units = f" in {paired.clusters} groups" if paired.clusters else ""
    what = "rise" if paired.rises else "drop"
    power = power_text(paired.smallest_drop, paired.power, paired.level, rises=paired.rises)
    if paired.needed is not None and paired.effect is not None:
        power += f"; one of {paired.effect:.3g} needs about {paired.needed} {'groups' if units else 'samples'}"
    return (
        f"p = {paired.p:.3g}, after Holm over {paired.gates} gate{'s' * (paired.gates != 1)} {paired.p_holm:.3g} "
        f"({paired.test}, n = {paired.n}{units}, {what} {paired.drop:.4g} with standard error {error}; {power})"
    )


def power_text(smallest: float | None, power: float = POWER, level: float = LEVEL, *, rises: bool = False) -> str:
    """Return the smallest drop, or rise, that a test detects as messages show it; None: it detects none."""
    what = "rise" if rises else "drop"
    found = f"no {what}" if smallest is None else f"a {what} of {smallest:.3g}"
    return f"detects {found} with {power:.0%} power at level {level:.3g}"


@dataclass(frozen=True)
class _Pairs:
    """Samples of a reference and of a state, in pairs."""

    before: list[float]
    after: list[float]
    clusters: tuple[int, ...] | None
    link: Link
    base: float
    """The reference's value."""
    higher_is_better: bool
    ends: tuple[float, float] | None
    """The range of the samples; None: unknown."""
    heaviest: float
    """Weight of the heaviest sample, as a multiple of the mean weight."""
    level_share: float
    """Share of a level that a test of these samples may spend: p is divided by it, see `Measurement`."""

    @cached_property
    def drops(self) -> Drops:
        """The losses of the samples."""
        return self.drops_to(self.after)

    def drops_to(self, after: Sequence[float]) -> Drops:
        """Return the losses if these were the samples of the state."""
        from evaluators.significance import Drops

        span = None if self.ends is None else (self.ends[1] - self.ends[0]) * self.heaviest
        better = self.higher_is_better
        return Drops(self.before, after, higher_is_better=better, clusters=self.clusters, span=span)

    def in_unit(self, drop: float) -> float:
        """Return a drop of the samples' mean in the metric's unit."""
        if self.link != "exp":
            return drop
        return self.base * (-expm1(-drop) if self.higher_is_better else expm1(drop))

    def in_samples(self, drop: float) -> float:
        """Return a drop of the metric as one of the samples' mean; infinite if the metric cannot drop so far."""
        if self.link != "exp":
            return drop
        left = 1 - drop / self.base if self.higher_is_better else 1 + drop / self.base
        return abs(math.log(left)) if left > 0 else math.inf


def _pairs(runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> _Pairs:
    """Pair the samples of all repeats; see `change`."""
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
            raise EvaluationError(f"the samples have other weights than in {name}")
        if tuple(one.clusters) != tuple(other.clusters):
            raise EvaluationError(f"the samples have other groups than in {name}")
    before, after = ([evened(m.samples, m.weights) for m in group] for group in (base, runs))
    value, better = sum(m.value for m in base) / len(base), runs[0].higher_is_better
    share = min(m.level_share for m in runs)
    ends = None if link == "exp" else _ends(runs[0], [x for m in (*base, *runs) for x in m.samples])
    heaviest = max(len(m.weights) * max(m.weights) / math.fsum(m.weights) if m.weights else 1.0 for m in base)
    # The base model is the same in all repeats; another reference is not. If its repeats may have asked the same
    # questions, assume they did: averaging never overstates the number of independent units.
    alike = {(x if name == BASE_MODEL else len(x), m.clusters) for x, m in zip(before, base, strict=True)}
    if len(alike) == 1:
        old, new = (
            list(group[0]) if len(group) == 1 else [math.fsum(row) / len(row) for row in zip(*group, strict=True)]
            for group in (before, after)
        )
        old = list(before[0]) if name == BASE_MODEL else old
        return _Pairs(old, new, base[0].clusters or None, link, value, better, ends, heaviest, share)
    clusters = side_by_side([(len(m.samples), m.clusters) for m in base])
    old, new = ([x for samples in group for x in samples] for group in (before, after))
    return _Pairs(old, new, clusters or None, link, value, better, ends, heaviest, share)


def _ends(measurement: Measurement, samples: Sequence[float]) -> tuple[float, float] | None:
    """Return the range of a metric's samples; one that no evaluator describes is a share if all samples are."""
    known = find_metric(measurement.metric, higher_is_better=measurement.higher_is_better)
    if math.isfinite(known.low) and math.isfinite(known.high):
        return known.low, known.high
    return (0.0, 1.0) if not known.data and min(samples) >= 0 and max(samples) <= 1 else None


def _link(measurement: Measurement) -> Link | None:
    return link_of(measurement.value, evened(measurement.samples, measurement.weights))


def _change(pairs: _Pairs, alternative: Alternative) -> Change:
    from evaluators.significance import compare_drops

    better = pairs.higher_is_better
    found = compare_drops(pairs.drops, alternative)
    worse = (i for i, (x, y) in enumerate(zip(pairs.before, pairs.after, strict=True)) if (y < x if better else y > x))
    error, rounding = found.stderr, pairs.in_unit(pairs.drops.rounding)
    if error is not None and pairs.link == "exp":  # to first order
        error = error * pairs.base if math.isfinite(error * pairs.base) else None
    p = min(1.0, found.p / pairs.level_share)
    return Change(pairs.in_unit(found.drop), error, p, found.test, found.n, tuple(worse), rounding)


def _smallest_drop(pairs: _Pairs, alpha: float) -> float | None:
    """Return the smallest drop that is detected, in the metric's unit; None if there is none, or it is infinite."""
    from evaluators.significance import smallest_drop

    found = smallest_drop(pairs.drops, alpha, POWER)
    drop = math.inf if found is None else pairs.in_unit(found)
    return drop if math.isfinite(drop) else None


def _smallest_p(pairs: _Pairs) -> float:
    """Return the p if every sample were as bad as it can be; 0 if this is unknown, or there is nothing to lose."""
    from evaluators.significance import compare_drops

    if pairs.ends is None:
        return 0.0
    worst = pairs.drops_to([pairs.ends[not pairs.higher_is_better]] * len(pairs.before))
    return min(1.0, compare_drops(worst).p / pairs.level_share) if worst.mean > 0 else 0.0
