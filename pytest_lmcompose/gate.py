"""Gates: thresholds on measurements, read from YAML, and their verdicts. No torch.

    "memit*":                     # glob over composition ids: * and ? only, brackets are literal
      edit_success_exact:         # glob over metrics
        min: 0.9                  # or max, min_ratio_of_base, max_ratio_of_base, no_drop_p

For each composition and metric the most specific rule holds and replaces all others: first by the
composition's glob (a plain id, then the more literal characters), then by the metric's, then the
later in the file. A rule without bounds, `{}`, lifts the gate. A metric that is NaN or infinite
fails whatever the rules; so does a rule for which nothing was measured.

`no_drop_p: 0.05` fails where the metric is worse than the base model's, by a one-sided paired test on
the same samples at that level after Holm's correction over all such gates of the run (see `paired`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from evaluators.measurement import EvaluationError, Measurement
from pytest_lmcompose.composition import BASE
from pytest_lmcompose.paired import Paired, compare_with_base, corrected, describe, finds, noise_floor
from pytest_lmcompose.repeats import find

NO_DROP = "no_drop_p"
BOUNDS = ("min", "max", "min_ratio_of_base", "max_ratio_of_base", NO_DROP)


class ThresholdError(ValueError):
    """A threshold file that cannot be read; the message names the file and the rule."""


@dataclass(frozen=True)
class Rule:
    """Bounds for the metrics and compositions that two globs match."""

    composition: str
    metric: str
    bounds: tuple[tuple[str, float], ...]

    def covers(self, composition: str) -> bool:
        """Say whether this is a rule for `composition`."""
        return _matches(self.composition, composition)

    def judges(self, metric: str) -> bool:
        """Say whether this is a rule for `metric`."""
        return _matches(self.metric, metric)

    @property
    def specificity(self) -> tuple[tuple[bool, int], tuple[bool, int]]:
        """Rank rules that match the same metric of the same composition."""
        return _specificity(self.composition), _specificity(self.metric)


@dataclass(frozen=True)
class Verdict:
    """What a gate found; a failing one says what was expected."""

    metric: str
    gate: str
    """min, max, min_ratio_of_base, max_ratio_of_base, no_drop_p, finite or measured."""
    threshold: float | None
    passed: bool
    message: str
    value: float | None = None
    base_value: float | None = None
    paired: Paired | None = None
    """The comparison behind no_drop_p."""


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Read a threshold file; raises ThresholdError."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ThresholdError(f"{path}: {error}") from None
    rules = []
    for composition, metrics in _mapping(document, str(path)).items():
        for metric, bounds in _mapping(metrics, f"{path}: {composition}").items():
            where = f"{path}: {composition}: {metric}"
            checked = tuple((k, _bound(k, v, where)) for k, v in _mapping(bounds, where).items())
            rules.append(Rule(composition, metric, checked))
    return tuple(rules)


def needs_base(rules: Sequence[Rule], composition: str) -> bool:
    """Say whether a gate of `composition` compares with the base model."""
    return any(rule.covers(composition) and any(_compares(kind) for kind, _ in rule.bounds) for rule in rules)


def paired_gates(rules: Sequence[Rule], composition: str, metrics: Iterable[str]) -> int:
    """Return how many of the gates of `composition` are paired tests, given what is measured."""
    if composition == BASE:
        return 0
    covering = [rule for rule in rules if rule.covers(composition)]
    found = [_rule_for(covering, metric) for metric in metrics]
    return sum(kind == NO_DROP for rule in found if rule is not None for kind, _ in rule.bounds)


def judge(
    rules: Sequence[Rule],
    composition: str,
    measurements: Sequence[Measurement],
    base: Sequence[Measurement] | None = None,
    *,
    runs: Sequence[Sequence[Measurement]] | None = None,
    base_runs: Sequence[Sequence[Measurement]] | None = None,
    gates: int = 1,
) -> tuple[Verdict, ...]:
    """Return the verdicts on a composition's measurements, in their order, then on what is missing.

    `runs` and `base_runs` are the repeats behind `measurements` and `base`, where there are several.
    `gates` is the number of paired gates of the run; see `settle` for their final verdict.
    """
    rules = [rule for rule in rules if rule.covers(composition)]
    before = {m.metric: m for m in base or ()}
    every, every_base = runs or (measurements,), base_runs or (base or (),)
    verdicts: list[Verdict] = []
    for measurement in measurements:
        name = measurement.metric
        label = f"{composition}  {name} = {_number(measurement.value)}"
        noise = _noise(measurement)
        if not math.isfinite(measurement.value):
            message = f"{label} is not finite {noise}"
            verdicts.append(Verdict(name, "finite", None, False, message, measurement.value))
            continue
        rule = _rule_for(rules, name)
        for kind, threshold in rule.bounds if rule is not None else ():
            if not _compares(kind):
                verdicts.append(_verdict(kind, threshold, measurement, before.get(name), label, noise))
                continue
            pairs = [(find(run, name), find(old, name)) for run, old in zip(every, every_base, strict=True)]
            known = [(run, old) for run, old in pairs if run is not None]
            if kind == NO_DROP:
                verdicts.append(_no_drop(threshold, measurement, known, composition, gates))
            else:
                floor = noise if composition == BASE else _with_power(noise, kind, known)
                verdicts.append(_verdict(kind, threshold, measurement, before.get(name), label, floor))
    measured = [measurement.metric for measurement in measurements]
    for rule in rules:
        replaced = any(r.metric == rule.metric and r.specificity > rule.specificity for r in rules)
        if rule.bounds and not replaced and not any(rule.judges(name) for name in measured):
            message = f"{composition}  {rule.metric} was not measured, but has a threshold"
            verdicts.append(Verdict(rule.metric, "measured", None, False, message))
    return tuple(dict.fromkeys(verdicts))


def settle(verdicts: Mapping[str, Sequence[Verdict]], gates: int = 0) -> dict[str, tuple[Verdict, ...]]:
    """Return the verdicts of compositions with their paired gates judged together.

    `gates` is their number in the whole run; those that are not here yet are counted as no alarm.
    """
    pairs = [v.paired for found in verdicts.values() for v in found if v.paired is not None]
    gates = max(gates, len(pairs))
    adjusted = iter(corrected([paired.p for paired in pairs], gates) if pairs else ())

    def settled(composition: str, verdict: Verdict) -> Verdict:
        if verdict.paired is None:
            return verdict
        return _judged(composition, verdict, replace(verdict.paired, p_holm=next(adjusted), gates=gates))

    return {name: tuple(settled(name, verdict) for verdict in found) for name, found in verdicts.items()}


def _no_drop(
    alpha: float,
    measurement: Measurement,
    pairs: Sequence[tuple[Measurement, Measurement | None]],
    composition: str,
    gates: int,
) -> Verdict:
    """Compare with the base model; whatever stands in the way fails."""
    verdict = Verdict(measurement.metric, NO_DROP, alpha, False, "", measurement.value)
    label = f"{composition}  {measurement.metric} = {_number(measurement.value)}"
    if composition == BASE:
        message = f"{label}: the base model is what the others are compared with {_noise(measurement)}"
        return replace(verdict, passed=True, message=message, base_value=measurement.value)
    base = [old for _, old in pairs if old is not None]
    try:
        paired, value = compare_with_base([run for run, _ in pairs], base, alpha, gates)
    except EvaluationError as error:
        message = f"{label}: {NO_DROP} cannot be judged: {error} {_noise(measurement)}"
        return replace(verdict, message=message)
    return _judged(composition, replace(verdict, base_value=value), paired)


def _judged(composition: str, verdict: Verdict, paired: Paired) -> Verdict:
    """Return a paired verdict with its final comparison and the message that goes with it."""
    assert verdict.threshold is not None and verdict.value is not None and verdict.base_value is not None
    passed = paired.p_holm > verdict.threshold
    message = (
        f"{composition}  {verdict.metric} = {_number(verdict.value)} is {'not ' * passed}worse than "
        f"{_number(verdict.base_value)} of the base model at {NO_DROP} {_number(verdict.threshold)}: "
        f"{describe(paired)}"
    )
    return replace(verdict, passed=passed, message=message, paired=paired)


def _rule_for(rules: Sequence[Rule], metric: str) -> Rule | None:
    """Return the rule that holds for a metric among those of one composition."""
    matching = [rule for rule in rules if rule.judges(metric)]
    if not matching:
        return None
    return max(enumerate(matching), key=lambda pair: (pair[1].specificity, pair[0]))[1]


def _compares(kind: str) -> bool:
    return kind == NO_DROP or kind.endswith("_of_base")


def _verdict(
    kind: str, threshold: float, measurement: Measurement, base: Measurement | None, label: str, noise: str
) -> Verdict:
    value, limit = measurement.value, threshold
    bound = f"{kind} {_number(threshold)}"
    if kind.endswith("_of_base"):
        if base is None or not math.isfinite(base.value) or base.value <= 0:
            before = base.value if base else None
            found = "was not measured" if base is None else f"is {_number(base.value)}"
            message = f"{label}: {kind} cannot be judged, since the base model's value {found} {noise}"
            return Verdict(measurement.metric, kind, threshold, False, message, value, before)
        limit = threshold * base.value
        bound = f"{kind} {_number(threshold)} of {_number(base.value)} = {_number(limit)}"
    passed = value >= limit if kind.startswith("min") else value <= limit
    sign = (">=" if passed else "<") if kind.startswith("min") else ("<=" if passed else ">")
    shown = label
    if not passed and _number(value) == _number(limit):  # equal as shown, but not in truth
        shown = label.replace(f"= {_number(value)}", f"= {value!r}")
        bound += f" ({limit!r})"
    message = f"{shown} {sign} {bound} {noise}"
    return Verdict(measurement.metric, kind, threshold, passed, message, value, base.value if base else None)


def _noise(measurement: Measurement) -> str:
    stderr = "unknown" if measurement.stderr is None else f"{measurement.stderr:.3g}"
    return f"(n = {measurement.n}, standard error {stderr})"


def _with_power(noise: str, kind: str, pairs: Sequence[tuple[Measurement, Measurement | None]]) -> str:
    """Add to what a verdict says of its noise the drop that its samples tell from none, where they can be paired."""
    runs = [run for run, _ in pairs]
    if kind.startswith("min") != runs[0].higher_is_better:  # a bound on the good side is no question of drops
        return noise
    try:
        floor = noise_floor(runs, [old for _, old in pairs if old is not None])
    except EvaluationError:
        return noise
    return f"{noise.removesuffix(')')}; a paired test {finds(floor)})"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _matches(glob: str, text: str) -> bool:
    pattern = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in glob)
    return re.fullmatch(pattern, text) is not None


def _specificity(glob: str) -> tuple[bool, int]:
    literal = sum(char not in "*?" for char in glob)
    return literal == len(glob), literal


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ThresholdError(f"{where}: expected a mapping with text keys, found {value!r}")
    return value


def _bound(kind: str, value: Any, where: str) -> float:
    if kind not in BOUNDS:
        raise ThresholdError(f"{where}: unknown bound {kind!r}; known: {', '.join(BOUNDS)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ThresholdError(f"{where}: {kind} is {value!r}, expected a number")
    if kind == NO_DROP and not 0 < value < 1:
        raise ThresholdError(f"{where}: {kind} is {value!r}, expected a level of significance such as 0.05")
    return float(value)


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """A safe loader that refuses a key written twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping
