"""Judge measurements by rules: every gate of a composition, its verdict and its message. Imports no torch.

Values and limits are compared as the decimal numbers they are written as, without rounding: from 0.8 to 0.7 is a
drop of exactly 0.1. A NaN or infinite metric always fails. So does a rule whose metric should have been
measured and was not, or whose reference is missing.

`no_drop_p: 0.05` fails if a one-sided paired test on the same samples finds the metric worse than its reference at
that level, after Holm's correction over all paired gates of the run (see `paired`). `not_worse_than: 0.02` passes only
if the samples exclude a loss of that margin. It needs no correction: a model passes only if all such gates pass, so the
chance that a model passes which lost a margin is at most the level. With `pool: true`, a rule decides once over the
samples of all its metrics (see `pools`).

`promised: NUMBER` applies if a step promises something about the metric (see `promises`). If a step's settings promise
a value, such as `average_bits`, the number is the tolerance, as a share of that value; if its category makes the
promise, the number is the limit. `promised: {max_ratio_of_base: 0.8}` has bounds that apply only then. `lost: REASON`
accepts a broken promise, and fails once the promise holds again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from evaluators.measurement import EvaluationError, Measurement
from interventions.names import near_names
from pytest_lmcompose.composition import BASE, parse
from pytest_lmcompose.gate.paired import (
    BASE_MODEL,
    change,
    compare_with_base,
    corrected,
    evidence_within,
    is_exact,
    noise_floor,
    power_text,
)
from pytest_lmcompose.gate.pools import Pool, members, of_pool, pooled_runs, pools
from pytest_lmcompose.gate.repeats import find
from pytest_lmcompose.gate.repeats import pooled as pooled_over_repeats
from pytest_lmcompose.gate.thresholds import (
    BASELINE,
    LOSS,
    LOSS_ERRORS,
    LOSS_PERCENT,
    LOST,
    NO_DROP,
    NOT_WORSE,
    NOT_WORSE_PERCENT,
    OF_EVIDENCE,
    PROMISED,
    Bound,
    Rule,
    references,
    rules_for,
)
from pytest_lmcompose.gate.verdicts import evidence_gate, paired_gate, shown_number
from pytest_lmcompose.results import Gate, replace

if TYPE_CHECKING:
    from pytest_lmcompose.gate.promises import Promise

_LOWER = ("min", "min_ratio", "min_ratio_of_base", "max_drop")
_SHOWN = 5
"""Samples that a message names."""


@dataclass(frozen=True)
class Reference:
    """A state, of this run or of a stored one, that gates compare with."""

    name: str
    """As messages show it."""
    measurements: Sequence[Measurement] = ()
    """Over all repeats."""
    runs: Sequence[Sequence[Measurement]] = ()
    """The measurements of each repeat."""
    replaced: bool = False
    """Whether this run replaces it, so that gates against it pass."""
    missing: str | None = None
    """Why nothing can be compared with it."""
    unlike: Mapping[str, str] = field(default_factory=dict)
    """Metrics that were measured on other data, and why they cannot be compared."""
    unpaired: Mapping[str, str] = field(default_factory=dict)
    """Metrics whose samples cannot be paired, and why."""

    def beside(self, measured: Sequence[Measurement]) -> Reference:
        """Return the reference with as many samples to pair as a state has that was measured in part."""
        sizes = {m.metric: m.n for m in measured if m.total}
        runs = [[m.first(sizes[m.metric]) if m.metric in sizes else m for m in run] for run in self.runs]
        return dataclasses.replace(self, runs=runs) if sizes else self


def judge(
    rules: Sequence[Rule],
    composition: str,
    measurements: Sequence[Measurement],
    known: Mapping[str, Reference],
    *,
    runs: Sequence[Sequence[Measurement]] | None = None,
    gates: int = 1,
    promises: Sequence[Promise] = (),
    off: Callable[[str], str | None] = lambda glob: None,
    task_of: Callable[[str], str] = lambda metric: "",
) -> tuple[Gate, ...]:
    """Return the gates of a composition: by measurement, then one failure for everything that was not measured.

    `off` says why metrics that a glob matches are not measured on purpose: these have no gate. `task_of` names the
    task of a metric that no evaluator describes, see `pools.pooled`.

    `known` maps composition ids, and `baseline` for the stored run, to their references. `runs` are the measurements
    of each repeat. `gates` counts the paired gates of the run; see `settle` for their final verdict. `promises` are
    made by the composition's steps.
    """
    rules = [rule for rule in rules if rule.covers(composition)]
    known = {key: reference.beside(measurements) for key, reference in known.items()}
    found: list[Gate] = []
    runs = runs or (measurements,)

    def gates_of(measurement: Measurement) -> _MetricGates:
        repeats = [find(run, measurement.metric) for run in runs]
        return _MetricGates(composition, measurement, repeats, known, gates, promises)

    for measurement in measurements:
        metric = gates_of(measurement)
        if math.isfinite(measurement.value):
            bounds = (bound for rule in rules_for(rules, measurement.metric) for bound in rule.bounds)
            found += (gate for bound in bounds if not bound.pool for gate in metric.judge(bound))
        else:
            found.append(metric.gate("finite", None, False, " is not finite"))
    for pool in pools(rules, [m for m in measurements if math.isfinite(m.value)]):
        judged = [gates_of(m) for m in measurements if m.metric in pool.metrics]
        if pool.bound.if_promised:
            judged = [of for of in judged if any(promise.about(of.measurement) for promise in promises)]
        if len(judged) > 1:
            found += _pool_gates(pool._replace(metrics=tuple(of.measurement.metric for of in judged)), judged, task_of)
        else:
            found += (gate for of in judged for gate in of.judge(pool.bound))
    found += _not_measured(rules, composition, [m.metric for m in measurements], known.get(BASELINE), off)
    return tuple(dict.fromkeys(found))


def _pool_gates(pool: Pool, judged: Sequence[_MetricGates], task_of: Callable[[str], str]) -> Iterator[Gate]:
    """Yield the gates of a pool, one for each reference."""
    first = judged[0]
    try:
        yield from _judged_together(pool, judged, task_of)
    except EvaluationError as error:
        kind = pool.bound.kind
        yield first.gate(kind, pool.bound.value, False, f": {kind} cannot be judged with {pool.name}: {error}")


def _judged_together(pool: Pool, judged: Sequence[_MetricGates], task_of: Callable[[str], str]) -> Iterator[Gate]:
    first = judged[0]
    runs = [[m for m in run if m is not None] for run in zip(*(of.repeats for of in judged), strict=True)]
    together = pooled_runs(pool, runs, task_of)
    if not together:
        raise EvaluationError(f"no repeat has measured all of {', '.join(pool.metrics)}")
    known = {key: _pooled(reference, pool, task_of) for key, reference in first.known.items()}
    metric = dataclasses.replace(
        first,
        measurement=pooled_over_repeats(together)[0],
        repeats=[run[0] for run in together],
        known=known,
        promises=(),
    )
    names = {reference.name: reference for reference in first.known.values()}
    for gate in metric.judge(dataclasses.replace(pool.bound, if_promised=False)):
        if gate.paired is not None or gate.evidence is not None:
            reference = names[gate.reference or BASE_MODEL]
            gate = replace(gate, pool=members(pool, runs, reference.runs, reference.name))
        if gate.paired is not None:
            gate = paired_gate(first.composition, gate, gate.paired, gate.paired.smallest_p)
        elif gate.evidence is not None:
            gate = evidence_gate(first.composition, gate, gate.evidence)
        yield gate


def _pooled(reference: Reference, pool: Pool, task_of: Callable[[str], str]) -> Reference:
    """Return a reference that has measured a pool instead of its metrics."""
    runs = pooled_runs(pool, reference.runs, task_of)
    return dataclasses.replace(
        reference,
        measurements=pooled_over_repeats(runs) if runs else (),
        runs=runs,
        unlike=of_pool(reference.unlike, pool),
        unpaired=of_pool(reference.unpaired, pool),
    )


@dataclass(frozen=True)
class _MetricGates:
    """Judges one metric of one composition."""

    composition: str
    measurement: Measurement
    repeats: Sequence[Measurement | None]
    known: Mapping[str, Reference]
    paired_gates: int
    promises: Sequence[Promise]

    def judge(self, bound: Bound) -> Iterator[Gate]:
        """Yield the gates of a bound, one for each reference."""
        if bound.if_promised and not any(promise.about(self.measurement) for promise in self.promises):
            return
        if bound.kind in (PROMISED, LOST):
            yield from self._promise(bound)
        elif bound.of is None:
            yield self._limit(bound, bound)
        elif bound.of == BASELINE:
            yield self._comparison(bound, BASELINE)
        elif compared := references(bound, parse(self.composition)):
            yield from (self._comparison(bound, other.id) for other in compared)
        else:
            value = self.measurement.value
            yield self.gate(bound.kind, bound.value, True, f": {self._nothing_to_compare(bound)}", base_value=value)

    def _promise(self, bound: Bound) -> Iterator[Gate]:
        """Yield the gate of `promised` or `lost`; none if no step promises anything about the metric."""
        value, higher = self.measurement.value, self.measurement.higher_is_better
        marked = f": marked as lost ({bound.note}), but"
        found = [promise for promise in self.promises if promise.about(self.measurement)]
        if not found:
            if bound.kind == LOST:
                yield self.gate(LOST, None, False, f"{marked} no step promises anything about it: remove the rule")
            return
        if valued := [(promise.value, promise) for promise in found if promise.value is not None]:
            promised, strictest = (max if higher else min)(valued, key=lambda pair: pair[0])
            limit = promised * (1 - bound.value if higher else 1 + bound.value)
        else:
            strictest, limit = next((p for p in found if p.broken_by is None), found[0]), bound.value
        passed = value >= limit if higher else value <= limit
        text = f"{limit:.6g}, promised by {strictest.step}"
        broken_by = None if passed else strictest.broken_by
        if broken_by is not None:
            text += f" and broken by {broken_by}"
        if bound.kind == LOST:
            accepted = f" is a known loss: {bound.note} (limit {text})"
            yield self.gate(
                LOST, None, not passed, f"{marked} it keeps {text}: remove the rule" if passed else accepted
            )
            return
        if broken_by is not None and strictest.value is not None:  # a promise of a category is broken by an attack
            text += f": use {self.composition}+{strictest.step}"
        yield self.gate(PROMISED, limit, passed, f" {_sign(passed, lower=higher)} {text}")

    def _comparison(self, bound: Bound, key: str) -> Gate:
        """Compare with the reference under `key`; the gate fails if they cannot be compared."""
        metric = self.measurement.metric
        missing = Reference(BASE_MODEL if key == BASE else key, missing="it was not measured")
        reference = self.known.get(key, missing)
        name = reference.name
        before = find(reference.measurements, metric)
        shown: dict[str, Any] = {
            "reference": None if key == BASE else name,
            "base_value": None if before is None else before.value,
        }

        def cannot(problem: str, **fields: Any) -> Gate:
            text = f": {bound.kind} cannot be judged{problem}"
            return self.gate(bound.kind, bound.value, False, text, **{**shown, **fields})

        if reference.replaced:
            text = f": {bound.kind} is not judged by {name}, which this run replaces"
            return self.gate(bound.kind, bound.value, True, text, **{**shown, "base_value": None})
        needs_pairs = bound.kind in (NO_DROP, LOSS_ERRORS, *OF_EVIDENCE)
        unpaired = reference.unpaired.get(metric) if needs_pairs else None
        if reason := reference.missing or reference.unlike.get(metric) or unpaired:
            return cannot(f" by {name}: {reason}")
        runs, base = self._repeats_of(reference)
        effective, unit = bound, 1.0
        notes: list[str] = []
        if needs_pairs and base and is_exact(runs, base):
            kind, value = OF_EVIDENCE.get(bound.kind, LOSS), bound.value if bound.kind in OF_EVIDENCE else 0.0
            effective = dataclasses.replace(bound, kind=kind, value=value)
            notes.append("exact, not sampled" + (": any loss counts" if not value else ""))
        try:
            if effective.kind == NO_DROP:
                paired, value = compare_with_base(runs, base, bound.value, self.paired_gates, name, bound.effect)
                gate = self.gate(bound.kind, bound.value, False, "", **{**shown, "base_value": value})
                return paired_gate(self.composition, gate, paired, paired.smallest_p)
            if effective.kind in OF_EVIDENCE:
                percent = effective.kind == NOT_WORSE_PERCENT
                evidence, value = evidence_within(runs, base, bound.value, bound.level, name, percent=percent)
                gate = self.gate(NOT_WORSE, evidence.margin, False, "", **{**shown, "base_value": value})
                return evidence_gate(self.composition, gate, evidence)
            if effective.kind == LOSS_ERRORS:
                unit = _standard_error(runs, base, name)
        except EvaluationError as error:
            return cannot(f": {error}", base_value=None)
        if before is None or not math.isfinite(before.value) or ("ratio" in bound.kind and before.value <= 0):
            value_text = "was not measured" if before is None else f"is {shown_number(before.value)}"
            owner = f"{name}'s value" if name == BASE_MODEL else f"the value of {name}"
            return cannot(f", since {owner} {value_text}")
        limits_loss = self._is_lower(effective) == self.measurement.higher_is_better
        if limits_loss and metric not in reference.unpaired:
            notes += _sample_notes(runs, base, name)
        return self._limit(bound, effective, before.value, name, notes, unit, **shown)

    def _repeats_of(self, reference: Reference) -> tuple[list[Measurement], list[Measurement]]:
        """Return the repeats that measured the metric, here and in `reference`."""
        before = [find(run, self.measurement.metric) for run in reference.runs]
        if len(before) == len(self.repeats):
            before = [old for run, old in zip(self.repeats, before, strict=True) if run is not None]
        return [run for run in self.repeats if run is not None], [old for old in before if old is not None]

    def _limit(
        self,
        bound: Bound,
        effective: Bound,
        before: float = 0.0,
        name: str = "",
        notes: Sequence[str] = (),
        unit: float = 1.0,
        **fields: Any,
    ) -> Gate:
        """Compare the value with the limit of the `effective` bound, which stands in for `bound`."""
        value, lower = self.measurement.value, self._is_lower(effective)
        limit = _limit(effective, _exact(before), lower, _exact(unit))
        passed = _exact(value) >= limit if lower else _exact(value) <= limit
        text = _bound_text(effective, before, name, lower)
        if bound.of is not None:
            text += f" = {shown_number(float(limit))}"
        if bound.if_promised:
            promise = next(p for p in self.promises if p.about(self.measurement))
            text += f", promised by {promise.step}"
            text += f" and broken by {promise.broken_by}" if promise.broken_by is not None and not passed else ""
        too_close = not passed and shown_number(value) == shown_number(
            float(limit)
        )  # the rounded numbers would look equal
        if too_close:
            text += f" ({float(limit)!r})"
        text = f" {_sign(passed, lower)} {text}"
        return self.gate(bound.kind, bound.value, passed, text, notes, exact=too_close, **fields)

    def _is_lower(self, bound: Bound) -> bool:
        """Return whether a bound is a lower limit."""
        if bound.kind.startswith(LOSS) or bound.kind in (NO_DROP, *OF_EVIDENCE):
            return self.measurement.higher_is_better
        return bound.kind in _LOWER

    def _nothing_to_compare(self, bound: Bound) -> str:
        if self.composition == BASE:
            return f"{BASE_MODEL} is the reference of all others"
        if bound.of == BASE:
            return f"{self.composition} is {BASE_MODEL}"
        return f"{bound.kind} of {bound.of} compares {self.composition} only with itself"

    def gate(
        self,
        kind: str,
        threshold: float | None,
        passed: bool,
        text: str,
        notes: Sequence[str] = (),
        *,
        exact: bool = False,
        base_value: float | None = None,
        reference: str | None = None,
    ) -> Gate:
        """Return a gate whose message is the value, `text`, then the noise and `notes` in brackets."""
        m = self.measurement
        value = repr(m.value) if exact else shown_number(m.value)
        error = "unknown" if m.stderr is None else f"{m.stderr:.3g}"
        noise = "; ".join((f"n = {m.n}, standard error {error}", *notes))
        message = f"{self.composition}  {m.metric} = {value}{text} ({noise})"
        return Gate(m.metric, kind, threshold, passed, message, m.value, base_value, reference=reference)


def _limit(bound: Bound, reference: Fraction, lower: bool, unit: Fraction) -> Fraction:
    """Return the limit of a bound; `unit` is the standard error that `max_loss: 3se` counts in."""
    threshold = _exact(bound.value)
    if bound.of is None:
        return threshold
    if "ratio" in bound.kind:
        return threshold * reference
    if bound.kind == LOSS_PERCENT:
        threshold = threshold / 100 * abs(reference)
    elif bound.kind == LOSS_ERRORS:
        threshold *= unit
    return reference - threshold if lower else reference + threshold


def _bound_text(bound: Bound, reference: float, name: str, lower: bool) -> str:
    """Return a bound as messages show it, without its limit."""
    number, before = shown_number(bound.value), shown_number(reference)
    if bound.of is None:
        return f"{bound.kind} {number}"
    if "ratio" in bound.kind:
        return f"{bound.kind} {number} of {before}" + ("" if bound.kind.endswith("_of_base") else f" of {name}")
    units = {LOSS_PERCENT: f"{LOSS} {number}%", LOSS_ERRORS: f"{LOSS} {number} standard errors"}
    amount = units.get(bound.kind, f"{bound.kind} {number}")
    return f"{amount} {'below' if lower else 'above'} {before} of {name}"


def _standard_error(runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> float:
    """Return the standard error of the difference of the pairs, but at least what may be rounding."""
    found = change(runs, base, name)
    if found.stderr is None:
        raise EvaluationError("a single sample has no standard error")
    return max(found.stderr, found.rounding)


def _sample_notes(runs: Sequence[Measurement], base: Sequence[Measurement], name: str) -> Iterator[str]:
    """Yield the smallest drop that these samples can detect, and which of them got worse; nothing if not paired."""
    try:
        floor = noise_floor(runs, base, name)
        yield f"a paired test {power_text(floor, rises=not runs[0].higher_is_better)}"
        if name == BASE_MODEL:
            return
        found = change(runs, base, name)
    except EvaluationError:
        return
    if found.worse:
        first = ", ".join(str(place + 1) for place in found.worse[:_SHOWN])
        more = ", ..." if len(found.worse) > _SHOWN else ""
        yield f"worse: {len(found.worse)} of {found.n} samples, number {first}{more}"


def _not_measured(
    rules: Sequence[Rule],
    composition: str,
    measured: Sequence[str],
    baseline: Reference | None,
    off: Callable[[str], str | None],
) -> Iterator[Gate]:
    """Yield a failure for every rule, and every gated metric of the baseline, whose measurement is missing."""
    for rule in rules:
        replaced = any(r.metric == rule.metric and r.specificity > rule.specificity and not r.source for r in rules)
        if rule.bounds and (rule.source or not replaced) and not any(rule.judges(name) for name in measured):
            if off(rule.metric) is not None:
                continue
            near = near_names(rule.metric, measured)
            message = f"{composition}  {rule.metric} was not measured, but has a threshold.{near}".removesuffix(".")
            yield Gate(rule.metric, "measured", None, False, message, None, None)
    if baseline is None:
        return
    for before in baseline.measurements:
        bounds = [bound for rule in rules_for(rules, before.metric) for bound in rule.bounds]
        gated = before.metric not in measured and any(bound.of == BASELINE for bound in bounds)
        if gated and off(before.metric) is None:
            message = f"{composition}  {before.metric} was not measured, but is in {baseline.name}"
            yield Gate(before.metric, "measured", None, False, message, None, before.value)


def settle(found: Mapping[str, Sequence[Gate]], gates: int = 0) -> dict[str, tuple[Gate, ...]]:
    """Return the gates of all compositions, with Holm's correction over their paired gates.

    `gates` counts the paired gates of the whole run; until the others are judged, they count as passed.
    """
    pairs = [gate.paired for gates_of in found.values() for gate in gates_of if gate.paired is not None]
    gates = max(gates, len(pairs))
    adjusted = iter(corrected([paired.p for paired in pairs], gates))
    # Gates that are not judged yet may reach any p, so a gate can never fail only if it cannot beside p = 0 elsewhere.
    least = [paired.smallest_p for paired in pairs] + [0.0] * (gates - len(pairs))
    reachable = iter(corrected(least, gates))

    def settled(composition: str, gate: Gate) -> Gate:
        if gate.paired is None:
            return gate
        paired = replace(gate.paired, p_holm=next(adjusted), gates=gates)
        return paired_gate(composition, gate, paired, next(reachable))

    return {name: tuple(settled(name, gate) for gate in gates_of) for name, gates_of in found.items()}


def count_paired(rules: Sequence[Rule], composition: str, measured: Sequence[Measurement]) -> int:
    """Return how many gates of `composition` are paired tests, if it is measured like `measured`."""
    covering = [rule for rule in rules if rule.covers(composition)]
    bounds = [b for m in measured for rule in rules_for(covering, m.metric) for b in rule.bounds if not b.pool]
    bounds += [pool.bound for pool in pools(covering, measured)]
    references_of = (references(b, parse(composition)) for b in bounds if b.kind == NO_DROP and b.of != BASELINE)
    return sum(b.kind == NO_DROP and b.of == BASELINE for b in bounds) + sum(map(len, references_of))


def _sign(passed: bool, lower: bool) -> str:
    return (">=" if passed else "<") if lower else ("<=" if passed else ">")


def _exact(value: float) -> Fraction:
    """Return the decimal number that a finite float is written as."""
    return Fraction(Decimal(repr(float(value))))  # twice as fast as Fraction(text)
