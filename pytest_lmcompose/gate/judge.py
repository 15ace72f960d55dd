"""Gates: the verdicts of rules on measurements. No torch.

Values are compared as the decimal numbers that they are written as, and never rounded before: from 0.8 to
0.7 is a drop of 0.1. A metric that is NaN or infinite fails whatever the rules; so does a rule for which
nothing was measured, and one whose reference is missing.

`no_drop_p: 0.05` fails where the metric is worse than its reference's, by a one-sided paired test on the
same samples at that level after Holm's correction over all such gates of the run (see `paired`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING

from evaluators.measurement import EvaluationError, Measurement
from interventions.names import near_names
from pytest_lmcompose.composition import BASE, parse
from pytest_lmcompose.gate.paired import (
    BASE_MODEL,
    change,
    compare_with_base,
    corrected,
    describe,
    finds,
    is_exact,
    noise_floor,
)
from pytest_lmcompose.gate.promised import hold
from pytest_lmcompose.gate.repeats import find
from pytest_lmcompose.gate.thresholds import (
    BASELINE,
    LOSS,
    LOSS_ERRORS,
    LOSS_PERCENT,
    LOST,
    NO_DROP,
    PROMISED,
    Bound,
    Rule,
    references,
    rules_for,
)
from pytest_lmcompose.results import Gate, Paired, replace

if TYPE_CHECKING:
    from pytest_lmcompose.gate.promises import Promise

_LOWER = ("min", "min_ratio", "min_ratio_of_base", "max_drop")
_SHOWN = 5
"""Samples that a message names."""


@dataclass(frozen=True)
class Reference:
    """A state of this run, or of a stored one, that gates compare with."""

    name: str
    """As a message says it."""
    measurements: Sequence[Measurement] = ()
    """Over all repeats."""
    runs: Sequence[Sequence[Measurement]] = ()
    """The repeats behind the measurements."""
    replaced: bool = False
    """Whether this run takes its place, so that nothing has to keep to it."""
    missing: str | None = None
    """Why nothing can be compared with it."""
    unlike: Mapping[str, str] = field(default_factory=dict)
    """Metrics that asked something else there, and what."""
    unpaired: Mapping[str, str] = field(default_factory=dict)
    """Metrics whose samples are others there, and why."""


def paired_gates(rules: Sequence[Rule], composition: str, metrics: Iterable[str]) -> int:
    """Return how many of the gates of `composition` are paired tests, given what is measured."""
    covering = [rule for rule in rules if rule.covers(composition)]
    bounds = [b for metric in metrics for rule in rules_for(covering, metric) for b in rule.bounds if b.kind == NO_DROP]
    return sum(1 if b.of == BASELINE else len(references(b, parse(composition))) for b in bounds)


def judge(
    rules: Sequence[Rule],
    composition: str,
    measurements: Sequence[Measurement],
    known: Mapping[str, Reference],
    *,
    runs: Sequence[Sequence[Measurement]] | None = None,
    gates: int = 1,
    promises: Sequence[Promise] = (),
) -> tuple[Gate, ...]:
    """Return the verdicts on a composition's measurements, in their order, then on what is missing.

    `known` are the references: states by the ids of their compositions, and the stored run as `baseline`.
    `runs` are the repeats behind `measurements`, where there are several. `gates` is the number of paired
    gates of the run; see `settle` for their final verdict. `promises` are those of the composition's steps.
    """
    rules = [rule for rule in rules if rule.covers(composition)]
    verdicts: list[Gate] = []
    for measurement in measurements:
        name = measurement.metric
        if not math.isfinite(measurement.value):
            message = f"{_label(composition, measurement)} is not finite {_noise(measurement)}"
            verdicts.append(Gate(name, "finite", None, False, message, measurement.value, None))
            continue
        found = [find(run, name) for run in runs or (measurements,)]
        state = _State(composition, measurement, found, gates, promises)
        for rule in rules_for(rules, name):
            for bound in rule.bounds:
                verdicts += _verdicts(bound, state, known)
    verdicts += _missing(rules, composition, [m.metric for m in measurements], known.get(BASELINE))
    return tuple(dict.fromkeys(verdicts))


def settle(verdicts: Mapping[str, Sequence[Gate]], gates: int = 0) -> dict[str, tuple[Gate, ...]]:
    """Return the verdicts of compositions with their paired gates judged together.

    `gates` is their number in the whole run; those that are not here yet are counted as no alarm.
    """
    pairs = [v.paired for found in verdicts.values() for v in found if v.paired is not None]
    gates = max(gates, len(pairs))
    adjusted = iter(corrected([paired.p for paired in pairs], gates) if pairs else ())
    # Those that are not here yet may reach any p: what can still fail beside them is not given up.
    least = [paired.smallest_p for paired in pairs] + [0.0] * (gates - len(pairs))
    reachable = iter(corrected(least, gates) if pairs else ())

    def settled(composition: str, verdict: Gate) -> Gate:
        if verdict.paired is None:
            return verdict
        paired = replace(verdict.paired, p_holm=next(adjusted), gates=gates)
        return _judged(composition, verdict, paired, next(reachable))

    return {name: tuple(settled(name, verdict) for verdict in found) for name, found in verdicts.items()}


@dataclass(frozen=True)
class _State:
    """One metric of one composition, as its gates see it."""

    composition: str
    measurement: Measurement
    repeats: Sequence[Measurement | None]
    gates: int
    promises: Sequence[Promise]

    @property
    def label(self) -> str:
        return _label(self.composition, self.measurement)

    def beside(self, reference: Reference) -> tuple[list[Measurement], list[Measurement]]:
        """Return the repeats that have the metric, and those of `reference`."""
        before = [find(run, self.measurement.metric) for run in reference.runs]
        if len(before) == len(self.repeats):
            before = [old for run, old in zip(self.repeats, before, strict=True) if run is not None]
        return [run for run in self.repeats if run is not None], [old for old in before if old is not None]


def _verdicts(bound: Bound, state: _State, known: Mapping[str, Reference]) -> Iterator[Gate]:
    """Yield the verdicts of a bound, one for each of its references."""
    verdict = Gate(state.measurement.metric, bound.kind, bound.value, False, "", state.measurement.value, None)
    noise = _noise(state.measurement)
    if bound.kind in (PROMISED, LOST):
        held = hold(bound, state.measurement, state.promises, state.composition)
        if held is not None:
            message = f"{state.label}{held.words} {noise}"
            yield replace(verdict, threshold=held.limit, passed=held.passed, message=message)
        return
    if bound.of is None:
        yield _bounded(bound, state, verdict, bound.value, "", noise)
        return
    ids = [BASELINE] if bound.of == BASELINE else [c.id for c in references(bound, parse(state.composition))]
    if not ids:
        value = state.measurement.value
        message = f"{state.label}: {_itself(bound, state.composition)} {noise}"
        yield replace(verdict, passed=True, message=message, base_value=value)
    for name in ids:
        reference = known.get(name, Reference(_called(name), missing="it was not measured"))
        named = replace(verdict, reference=None if name == BASE else reference.name)
        yield _compared(bound, state, reference, named)


def _compared(bound: Bound, state: _State, reference: Reference, verdict: Gate) -> Gate:
    """Judge a bound that compares with `reference`; whatever stands in the way fails."""
    metric, noise = state.measurement.metric, _noise(state.measurement)
    if reference.replaced:
        message = f"{state.label}: {bound.kind} is not judged by {reference.name}, whose place this run takes {noise}"
        return replace(verdict, passed=True, message=message)
    before = find(reference.measurements, metric)
    reason = reference.missing or reference.unlike.get(metric)
    if reason is None and bound.kind in (NO_DROP, LOSS_ERRORS):
        reason = reference.unpaired.get(metric)
    if reason is not None:
        message = f"{state.label}: {bound.kind} cannot be judged by {reference.name}: {reason} {noise}"
        return replace(verdict, message=message, base_value=None if before is None else before.value)
    runs, base = state.beside(reference)
    if bound.kind in (NO_DROP, LOSS_ERRORS) and base and is_exact(runs, base):
        bound = changed(bound, kind=LOSS, value=0.0)
        noise = f"{noise.removesuffix(')')}; read and not sampled, so that any loss is one)"
    try:
        if bound.kind == NO_DROP:
            paired, value = compare_with_base(runs, base, bound.value, state.gates, reference.name)
            return _judged(state.composition, replace(verdict, base_value=value), paired, paired.smallest_p)
        unit = 1.0
        if bound.kind == LOSS_ERRORS:
            unit = _error(runs, base, reference.name)
    except EvaluationError as error:
        return replace(verdict, message=f"{state.label}: {bound.kind} cannot be judged: {error} {noise}")
    ratio = "ratio" in bound.kind
    if before is None or not math.isfinite(before.value) or (ratio and before.value <= 0):
        found = "was not measured" if before is None else f"is {_number(before.value)}"
        owner = f"{reference.name}'s value" if reference.name == BASE_MODEL else f"the value of {reference.name}"
        message = f"{state.label}: {bound.kind} cannot be judged, since {owner} {found} {noise}"
        return replace(verdict, message=message, base_value=None if before is None else before.value)
    if metric not in reference.unpaired and _is_lower(bound, state.measurement) == state.measurement.higher_is_better:
        noise = _with_power(noise, runs, base, reference.name)  # a bound on the good side is no question of drops
        if reference.name != BASE_MODEL:
            noise = _with_worse(noise, runs, base, reference.name)
    return _bounded(bound, state, replace(verdict, base_value=before.value), before.value, reference.name, noise, unit)


def _bounded(
    bound: Bound, state: _State, verdict: Gate, reference: float, name: str, noise: str, unit: float = 1.0
) -> Gate:
    """Compare a value with its limit, as the decimal numbers that both are written as."""
    value = state.measurement.value
    lower = _is_lower(bound, state.measurement)
    limit = _limit(bound, _exact(reference), lower, unit)
    passed = _exact(value) >= limit if lower else _exact(value) <= limit
    sign = (">=" if passed else "<") if lower else ("<=" if passed else ">")
    shown, text = state.label, _described(bound, reference, name, lower)
    if bound.of is not None:
        text += f" = {_number(float(limit))}"
    if not passed and _number(value) == _number(float(limit)):  # equal as shown, but not in truth
        shown = shown.replace(f"= {_number(value)}", f"= {value!r}")
        text += f" ({float(limit)!r})"
    return replace(verdict, passed=passed, message=f"{shown} {sign} {text} {noise}")


def _limit(bound: Bound, reference: Fraction, lower: bool, unit: float) -> Fraction:
    threshold = _exact(bound.value)
    if bound.of is None:
        return threshold
    if "ratio" in bound.kind:
        return threshold * reference
    if bound.kind == LOSS_PERCENT:
        threshold = threshold / 100 * abs(reference)
    elif bound.kind == LOSS_ERRORS:
        threshold *= _exact(unit)
    return reference - threshold if lower else reference + threshold


def _described(bound: Bound, reference: float, name: str, lower: bool) -> str:
    """Return a bound as a message shows it, up to its limit."""
    number = _number(bound.value)
    if bound.of is None:
        return f"{bound.kind} {number}"
    if bound.kind.endswith("_of_base"):
        return f"{bound.kind} {number} of {_number(reference)}"
    if "ratio" in bound.kind:
        return f"{bound.kind} {number} of {_number(reference)} of {name}"
    amount = {LOSS_PERCENT: f"{LOSS} {number}%", LOSS_ERRORS: f"{LOSS} {number} standard errors"}.get(
        bound.kind, f"{bound.kind} {number}"
    )
    return f"{amount} {'below' if lower else 'above'} {_number(reference)} of {name}"


def _judged(composition: str, verdict: Gate, paired: Paired, reachable: float) -> Gate:
    """Return a paired verdict with its final comparison and the message that goes with it.

    `reachable` is the smallest p after Holm that there could have been: a gate that could not fail does.
    """
    assert verdict.threshold is not None and verdict.value is not None and verdict.base_value is not None
    passed = paired.p_holm > verdict.threshold
    message = (
        f"{composition}  {verdict.metric} = {_number(verdict.value)} is {'not ' * passed}worse than "
        f"{_number(verdict.base_value)} of {verdict.reference or BASE_MODEL} at {NO_DROP} "
        f"{_number(verdict.threshold)}: {describe(paired)}"
    )
    if reachable > verdict.threshold:
        message = (
            f"{composition}  {verdict.metric} = {_number(verdict.value)}: {NO_DROP} {_number(verdict.threshold)} could "
            f"never fail: these samples reach p = {reachable:.3g} at best, after Holm; ask more, or set another level "
            f"or bound ({paired.test}, n = {paired.n})"
        )
        passed = False
    return replace(verdict, passed=passed, message=message, paired=paired)


def _missing(
    rules: Sequence[Rule], composition: str, measured: Sequence[str], baseline: Reference | None
) -> Iterator[Gate]:
    """Yield a failure for every rule, and every metric of the stored run, for which nothing was measured."""
    for rule in rules:
        replaced = any(r.metric == rule.metric and r.specificity > rule.specificity and not r.source for r in rules)
        if rule.bounds and (rule.source or not replaced) and not any(rule.judges(name) for name in measured):
            near = near_names(rule.metric, measured)
            message = f"{composition}  {rule.metric} was not measured, but has a threshold.{near}".removesuffix(".")
            yield Gate(rule.metric, "measured", None, False, message, None, None)
    for before in () if baseline is None else baseline.measurements:
        bounds = [bound for rule in rules_for(rules, before.metric) for bound in rule.bounds]
        if before.metric not in measured and any(bound.of == BASELINE for bound in bounds):
            message = f"{composition}  {before.metric} was not measured, but is in {baseline.name}" if baseline else ""
            yield Gate(before.metric, "measured", None, False, message, None, before.value)


def _itself(bound: Bound, composition: str) -> str:
    """Say why a bound has nothing to compare with."""
    if composition == BASE:
        return f"{BASE_MODEL} is what the others are compared with"
    if bound.of == BASE:
        return f"{composition} is {BASE_MODEL}"
    return f"{bound.kind} of {bound.of} compares {composition} with nothing but itself"


def _called(name: str) -> str:
    return BASE_MODEL if name == BASE else name


def _is_lower(bound: Bound, measurement: Measurement) -> bool:
    """Say whether a bound keeps a value from being too low."""
    if bound.kind.startswith(LOSS) or bound.kind == NO_DROP:
        return measurement.higher_is_better
    return bound.kind in _LOWER


def _error(runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> float:
    """Return the standard error of the difference of the pairs."""
    found = change(runs, base, name)
    if found.stderr is None:
        raise EvaluationError("a single sample has no standard error")
    return found.stderr


def _with_power(noise: str, runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> str:
    """Add to what a verdict says of its noise the drop that its samples tell from none, where they can be paired."""
    try:
        floor = noise_floor(runs, base, name)
    except EvaluationError:
        return noise
    what = "drop" if runs[0].higher_is_better else "rise"
    return f"{noise.removesuffix(')')}; a paired test {finds(floor, what=what)})"


def _with_worse(noise: str, runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> str:
    """Add the samples that got worse, where they are known to be the same."""
    try:
        found = change(runs, base, name)
    except EvaluationError:
        return noise
    if not found.worse:
        return noise
    first = ", ".join(str(place + 1) for place in found.worse[:_SHOWN])
    more = ", ..." if len(found.worse) > _SHOWN else ""
    return f"{noise.removesuffix(')')}; worse: {len(found.worse)} of {found.n} samples, number {first}{more})"


def _label(composition: str, measurement: Measurement) -> str:
    return f"{composition}  {measurement.metric} = {_number(measurement.value)}"


def _noise(measurement: Measurement) -> str:
    stderr = "unknown" if measurement.stderr is None else f"{measurement.stderr:.3g}"
    return f"(n = {measurement.n}, standard error {stderr})"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _exact(value: float) -> Fraction:
    """Return the decimal number that a finite float is written as, which no two floats share."""
    return Fraction(Decimal(repr(float(value))))  # which reads a text in half the time that a fraction takes for it
