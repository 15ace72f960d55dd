"""Gates: thresholds on measurements, read from YAML, and their verdicts. No torch.

    "memit*":                     # glob over composition ids: * and ? only, brackets are literal
      edit_success_exact:         # glob over metrics
        min: 0.9                  # or max, min_ratio_of_base, max_ratio_of_base

For each composition and metric the most specific rule holds and replaces all others: first by the
composition's glob (a plain id, then the more literal characters), then by the metric's, then the
later in the file. A rule without bounds, `{}`, lifts the gate. A metric that is NaN or infinite
fails whatever the rules; so does a rule for which nothing was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluators.measurement import Measurement

BOUNDS = ("min", "max", "min_ratio_of_base", "max_ratio_of_base")


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
    """min, max, min_ratio_of_base, max_ratio_of_base, finite or measured."""
    threshold: float | None
    passed: bool
    message: str
    value: float | None = None
    base_value: float | None = None


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
    return any(rule.covers(composition) and any(kind.endswith("_of_base") for kind, _ in rule.bounds) for rule in rules)


def judge(
    rules: Sequence[Rule],
    composition: str,
    measurements: Sequence[Measurement],
    base: Sequence[Measurement] | None = None,
) -> tuple[Verdict, ...]:
    """Return the verdicts on a composition's measurements, in their order, then on what is missing."""
    rules = [rule for rule in rules if rule.covers(composition)]
    before = {m.metric: m for m in base or ()}
    verdicts: list[Verdict] = []
    for measurement in measurements:
        name = measurement.metric
        label = f"{composition}  {name} = {_number(measurement.value)}"
        noise = _noise(measurement)
        if not math.isfinite(measurement.value):
            message = f"{label} is not finite {noise}"
            verdicts.append(Verdict(name, "finite", None, False, message, measurement.value))
            continue
        matching = [rule for rule in rules if rule.judges(name)]
        if matching:
            rule = max(enumerate(matching), key=lambda pair: (pair[1].specificity, pair[0]))[1]
            verdicts += [_verdict(k, t, measurement, before.get(name), label, noise) for k, t in rule.bounds]
    measured = [measurement.metric for measurement in measurements]
    for rule in rules:
        replaced = any(r.metric == rule.metric and r.specificity > rule.specificity for r in rules)
        if rule.bounds and not replaced and not any(rule.judges(name) for name in measured):
            message = f"{composition}  {rule.metric} was not measured, but has a threshold"
            verdicts.append(Verdict(rule.metric, "measured", None, False, message))
    return tuple(dict.fromkeys(verdicts))


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
