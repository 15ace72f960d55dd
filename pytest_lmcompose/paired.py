"""Paired gates: whether a composition is worse than the base model on the same samples.

All paired gates of a run are one family: Holm's correction keeps the chance of any false alarm in the
run at alpha. A gate is judged when its test runs, with the gates that are not known yet counted as if
they alarmed nothing; when the run is over, all of them are judged again together, which may only add
alarms. Imports numpy and scipy with the first comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evaluators.measurement import EvaluationError, Measurement
from pytest_lmcompose.repeats import Link, evened, link_of, side_by_side

POWER = 0.8
LEVEL = 0.05
"""Of the drop that a gate without a level of its own tells from noise."""


@dataclass(frozen=True)
class Paired:
    """A comparison with the base model; drops are in the metric's unit, positive where it got worse."""

    test: str
    n: int
    drop: float
    stderr: float | None
    """Of the drop."""
    p: float
    p_holm: float
    gates: int
    """Paired gates of the run, for which p is corrected."""
    smallest_drop: float | None
    """That is found with a chance of `power` at `level`; None: no drop is."""
    power: float
    level: float
    """Alpha over the number of gates that were planned: what Holm asks of the smallest p."""
    clusters: int = 0
    """Independent units, where these are groups of samples, such as the prompts of one edit; else 0."""


def compare_with_base(
    runs: Sequence[Measurement], base: Sequence[Measurement], alpha: float, gates: int
) -> tuple[Paired, float]:
    """Compare the measurements of one metric, one a repeat, with the base model's.

    Returns the comparison, with p not yet corrected, and the base model's value. Where the base
    model answers alike in all repeats, these ask the same questions: the answers to each are averaged.
    Else the samples of all repeats stand side by side; so the drop is one on these edits. Samples of
    one cluster count as one unit.

    Raises EvaluationError for samples that cannot be paired, or that do not make the metric's value.
    """
    from evaluators.significance import compare

    before, after, clusters, link = _matched(runs, base)
    better = runs[0].higher_is_better
    found = compare(before, after, higher_is_better=better, clusters=clusters)
    smallest = _smallest(before, after, clusters, better, alpha / gates)
    value = sum(m.value for m in base) / len(base)
    paired = Paired(
        found.test,
        found.n,
        _in_unit(found.drop, value, link, better),
        None if found.stderr is None else found.stderr * (value if link == "exp" else 1),
        found.p,
        found.p,
        gates,
        None if smallest is None else _in_unit(smallest, value, link, better),
        POWER,
        alpha / gates,
        len(set(clusters or ())),
    )
    return paired, value


def noise_floor(runs: Sequence[Measurement], base: Sequence[Measurement]) -> float | None:
    """Return the smallest drop from the base model that these samples tell from noise, at `LEVEL`.

    None: no drop is. Raises EvaluationError like `compare_with_base`.
    """
    before, after, clusters, link = _matched(runs, base)
    better = runs[0].higher_is_better
    smallest = _smallest(before, after, clusters, better, LEVEL)
    return None if smallest is None else _in_unit(smallest, sum(m.value for m in base) / len(base), link, better)


def corrected(p_values: Sequence[float], gates: int) -> list[float]:
    """Return p-values after Holm's correction for `gates`, those not given counted as 1."""
    from evaluators.significance import holm

    return holm([*p_values, *[1.0] * (gates - len(p_values))])[: len(p_values)]


def describe(paired: Paired) -> str:
    """Return what a verdict says of its comparison."""
    error = "unknown" if paired.stderr is None else f"{paired.stderr:.3g}"
    units = f" in {paired.clusters} groups" if paired.clusters else ""
    return (
        f"p = {paired.p:.3g}, after Holm over {paired.gates} gate{'s' * (paired.gates != 1)} {paired.p_holm:.3g} "
        f"({paired.test}, n = {paired.n}{units}, drop {paired.drop:.4g} with standard error {error}; "
        f"{finds(paired.smallest_drop, paired.power, paired.level)})"
    )


def finds(smallest: float | None, power: float = POWER, level: float = LEVEL) -> str:
    """Return what a verdict says of the smallest drop it could have found; None: it finds none."""
    drops = "no drop" if smallest is None else f"drops from {smallest:.3g}"
    return f"finds {drops} with {power:.0%} power at level {level:.3g}"


class _Matched(NamedTuple):
    """Samples of the base model and of a state, in pairs."""

    before: list[float]
    after: list[float]
    clusters: tuple[int, ...] | None
    link: Link


def _matched(runs: Sequence[Measurement], base: Sequence[Measurement]) -> _Matched:
    """Pair the samples of all repeats, see `compare_with_base`."""
    if len(base) != len(runs) or not base:
        raise EvaluationError(f"the base model was measured in {len(base)} of {len(runs)} repeats")
    links = {link_of(m.value, evened(m.samples, m.weights)) for m in (*base, *runs)}
    link = links.pop()
    if links or link is None:
        raise EvaluationError("the samples do not average to the value")
    for one, other in zip(base, runs, strict=True):
        if len(one.samples) != len(other.samples):
            raise EvaluationError(f"{len(one.samples)} samples of the base model against {len(other.samples)}")
        if tuple(one.weights) != tuple(other.weights):
            raise EvaluationError("the samples count differently for the base model")
        if tuple(one.clusters) != tuple(other.clusters):
            raise EvaluationError("the samples are grouped differently for the base model")
    before, after = ([evened(m.samples, m.weights) for m in group] for group in (base, runs))
    if len({(samples, m.clusters) for samples, m in zip(before, base, strict=True)}) == 1:
        averaged = [math.fsum(row) / len(row) for row in zip(*after, strict=True)]
        return _Matched(list(before[0]), averaged, base[0].clusters or None, link)
    clusters = side_by_side([(len(m.samples), m.clusters) for m in base])
    return _Matched(
        [x for group in before for x in group], [x for group in after for x in group], clusters or None, link
    )


def _smallest(
    before: list[float], after: list[float], clusters: tuple[int, ...] | None, higher_is_better: bool, alpha: float
) -> float | None:
    from evaluators.significance import smallest_drop

    return smallest_drop(before, after, higher_is_better=higher_is_better, alpha=alpha, power=POWER, clusters=clusters)


def _in_unit(drop: float, base: float, link: Link, higher_is_better: bool) -> float:
    """Return a drop of the samples' mean as one of the metric, whose base value is given."""
    if link != "exp":
        return drop
    return base * (-math.expm1(-drop) if higher_is_better else math.expm1(drop))
