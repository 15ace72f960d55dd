"""Read the rules of gates from YAML and from `--lmcompose-compare-fail`. Imports no torch.

    "memit*":                     # glob over composition ids: only * and ? are special
      edit_success_exact:         # glob over metrics
        min: 0.9                  # a number, a mapping with `value` and `of`, or a list of them
        max_drop: {value: 0.05, of: single}

For each composition and metric, only the most specific rule applies: first compare the composition globs (a plain id
wins, then more literal characters), then the metric globs, then the later rule wins. A rule without bounds, `{}`,
removes the gate. Expressions from the command line apply in addition to the rules of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from interventions.names import near_names
from pytest_lmcompose.composition import BASE, Composition, CompositionError, parse
from pytest_lmcompose.gate.globs import impossible, matches, overlap, specificity
from pytest_lmcompose.gate.promises import may_be_promised

SINGLE, REVERSE, BASELINE = "single", "reverse", "baseline"
NO_DROP = "no_drop_p"
LOSS, LOSS_PERCENT, LOSS_ERRORS = "max_loss", "max_loss_percent", "max_loss_se"
NOT_WORSE, NOT_WORSE_PERCENT = "not_worse_than", "not_worse_than_percent"
OF_EVIDENCE = {NOT_WORSE: LOSS, NOT_WORSE_PERCENT: LOSS_PERCENT}
"""Kinds of bounds that ask for evidence, and those that they become for metrics without noise."""
ABSOLUTE = ("min", "max")
RELATIVE = ("max_drop", "max_rise", "min_ratio", "max_ratio", LOSS, NO_DROP, NOT_WORSE)
"""Bounds relative to a reference: the base model, unless `of` names another one."""
OF_BASE = ("min_ratio_of_base", "max_ratio_of_base")
PROMISED, LOST = "promised", "lost"
"""Bounds on what the steps promise; see `judge`."""
BOUNDS = (*ABSOLUTE, *RELATIVE, *OF_BASE, PROMISED, LOST)
_KEYS = {NO_DROP: ("value", "of", "effect", "pool"), NOT_WORSE: ("margin", "level", "of", "pool")}
"""Keys of bounds that have more than `value` and `of`."""
LEVEL = 0.05
"""Significance level of `not_worse_than`, unless it names another."""
_LIMIT = re.compile(
    r"(?P<pool>pool\s+)?(?P<sign>[pn])?\s*(?P<number>\d+(\.\d*)?([eE]-?\d+)?|\.\d+([eE]-?\d+)?)\s*(?P<unit>%|se)?"
)
_LIMITS = (
    "a loss such as 0.01, 5% (of the old value) or 3se (standard errors), a level such as p0.01 or 'pool p0.01', or a "
    "margin such as n0.02, n5% or 'pool n0.02'"
)


NOT_JUDGED = "not judged, because "
"""Start of the reason of a rule whose metric is not measured on purpose."""
_REFERENCES = (BASE, SINGLE, REVERSE, BASELINE)


class ThresholdError(ValueError):
    """Invalid thresholds; the message names the file and the rule, or the expression."""


@dataclass(frozen=True)
class Bound:
    """One limit of a metric."""

    kind: str
    """One of `BOUNDS`, or one with its unit: max_loss_percent, max_loss_se, not_worse_than_percent."""
    value: float
    of: str | None = None
    """The reference: base, single, reverse, baseline or the id of a composition."""
    note: str = ""
    """Why the loss of a promise is accepted."""
    if_promised: bool = False
    """Whether it applies only if a step promises something about the metric: `promised: {max_ratio_of_base: 0.8}`."""
    level: float = LEVEL
    """Significance level of `not_worse_than`."""
    effect: float | None = None
    """The loss that `no_drop_p` counts the needed samples for; None: 5 % of the reference."""
    pool: bool = False
    """Whether one decision is made over all metrics that the rule's glob matches; see `pools`."""


@dataclass(frozen=True)
class Rule:
    """Bounds on all metrics and compositions that two globs match."""

    composition: str
    metric: str
    bounds: tuple[Bound, ...]
    source: str = ""
    """The expression from the command line; empty for a rule from the file."""

    def covers(self, composition: str) -> bool:
        """Return whether the rule is for `composition`."""
        return matches(self.composition, composition)

    def judges(self, metric: str) -> bool:
        """Return whether the rule is for `metric`."""
        return matches(self.metric, metric)

    @cached_property
    def specificity(self) -> tuple[tuple[bool, int], tuple[bool, int]]:
        """The rank among rules for the same metric of the same composition."""
        return specificity(self.composition), specificity(self.metric)


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Read a threshold file; raises ThresholdError."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ThresholdError(f"{path}: {error}") from None
    rules = []
    for composition, metrics in _mapping(document, str(path), filled=True).items():
        for metric, bounds in _mapping(metrics, f"{path}: {composition}", filled=True).items():
            where = f"{path}: {composition}: {metric}"
            checked = [bound for k, v in _mapping(bounds, where).items() for bound in _bounds(k, v, where)]
            _check_together(checked, where)
            if any(b.kind in (PROMISED, LOST) or b.if_promised for b in checked) and not may_be_promised(metric):
                raise ThresholdError(f"{where}: no method or category promises anything about this metric")
            rules.append(Rule(composition, metric, tuple(checked)))
    for rule in rules:
        if not rule.bounds and not any(_removes(rule, other) for other in rules):
            raise ThresholdError(
                f"{path}: {rule.composition}: {rule.metric}: {{}} removes a gate, but no rule sets one"
            )
    return tuple(rules)


def check_compositions(rules: Iterable[Rule], path: Path, methods: Collection[str]) -> None:
    """Raise ThresholdError for a rule that matches no composition of `methods`."""
    for rule in rules:
        if (problem := impossible(rule.composition, methods)) is not None:
            where = f"--lmcompose-compare-fail={rule.source!r}" if rule.source else f"{path}: {rule.composition!r}"
            raise ThresholdError(f"{where}: {problem}")


def read_expression(text: str) -> Rule:
    """Read `[COMPOSITION::]METRIC:LIMIT`, a rule that compares with the baseline; COMPOSITION and METRIC are globs.

    LIMIT is how much worse the metric may be: `0.01`, `5%` of the baseline's value, `3se` (standard errors of the
    difference), or `p0.01`: not worse by a paired test at that level. `n0.02` and `n5%` ask for evidence: they pass
    only if a loss of this margin is excluded. `pool p0.01` and `pool n0.02` decide once over all metrics that match.
    Raises ThresholdError.
    """
    names, colon, limit = text.rpartition(":")
    composition, separator, metric = names.rpartition("::")
    if not colon or not metric.strip() or metric.endswith(":") or (separator and not composition.strip()):
        raise ThresholdError(
            f"{text!r}: expected [COMPOSITION::]METRIC:LIMIT, such as recall:5% or 'memit*::recall:p0.01'"
        )
    bound = _limit(limit, text)
    return Rule(composition.strip() or "*", metric.strip(), (replace(bound, of=BASELINE),), text)


def rules_for(rules: Sequence[Rule], metric: str) -> list[Rule]:
    """Return those of one composition's rules that apply to a metric: the best of the file, and all expressions."""
    matching = [rule for rule in rules if rule.judges(metric)]
    of_file = [rule for rule in matching if not rule.source]
    best = max(enumerate(of_file), key=lambda pair: (pair[1].specificity, pair[0]))[1:] if of_file else ()
    return [*best, *(rule for rule in matching if rule.source)]


def references(bound: Bound, composition: Composition) -> tuple[Composition, ...]:
    """Return the compositions that a bound on `composition` compares with, without itself and the baseline."""
    steps = composition.steps
    if bound.of is None or bound.of == BASELINE:
        return ()
    if bound.of == SINGLE:
        found = [Composition((step,)) for step in steps]
    elif bound.of == REVERSE:
        found = [Composition(steps[::-1])]
    else:
        found = [parse(bound.of)]
    return tuple(dict.fromkeys(c for c in found if c != composition))


def compares_with(rules: Iterable[Rule], composition: Composition) -> tuple[Composition, ...]:
    """Return all compositions that the gates of `composition` compare with."""
    covering = [rule for rule in rules if rule.covers(composition.id)]
    return tuple(dict.fromkeys(c for rule in covering for b in rule.bounds for c in references(b, composition)))


def needs_baseline(rules: Iterable[Rule], composition: str | None = None) -> bool:
    """Return whether a gate, of `composition` or of any, compares with the baseline."""
    return any(
        bound.of == BASELINE
        for rule in rules
        if composition is None or rule.covers(composition)
        for bound in rule.bounds
    )


@dataclass(frozen=True)
class Unused:
    """A rule that applied to nothing."""

    composition: str
    metric: str
    tested: bool
    """Whether a composition that it covers was measured."""
    reason: str

    def __str__(self) -> str:
        return f"{self.composition!r}: {self.metric!r}: {self.reason}"


def unused(
    rules: Sequence[Rule], measured: Mapping[str, Sequence[str]], off: Callable[[str], str | None] = lambda glob: None
) -> list[Unused]:
    """Return the rules that apply to nothing; `measured` maps compositions to their metrics.

    `off` says why metrics that a glob matches are not measured on purpose.
    """
    applied: set[int] = set()
    for composition, metrics in measured.items():
        covering = [rule for rule in rules if rule.covers(composition)]
        applied |= {id(rule) for metric in metrics for rule in rules_for(covering, metric)}
    found = []
    for rule in rules:
        if id(rule) in applied:
            continue
        covered = [name for name in measured if rule.covers(name)]
        known = dict.fromkeys(metric for name in covered for metric in measured[name])
        if not covered:
            reason = "matches no measured composition." + near_names(rule.composition, measured)
        elif not any(rule.judges(metric) for metric in known):
            why = off(rule.metric)
            reason = f"{NOT_JUDGED}{why}" if why else "matches no measured metric." + near_names(rule.metric, known)
        else:
            reason = "a more specific rule always applies instead."
        found.append(Unused(rule.composition, rule.metric, bool(covered), reason.removesuffix(".")))
    return found


def own_compositions(rules: Iterable[Rule]) -> tuple[str, ...]:
    """Return the ids of compositions that bounds name in `of`."""
    named = dict.fromkeys(bound.of for rule in rules for bound in rule.bounds if bound.of is not None)
    return tuple(of for of in named if of not in _REFERENCES)


def _bounds(kind: str, value: Any, where: str) -> list[Bound]:
    if kind not in BOUNDS:
        raise ThresholdError(
            f"{where}: unknown bound {kind!r}; known: {', '.join(BOUNDS)}.{near_names(kind, BOUNDS, cutoff=0.6)}"
        )
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ThresholdError(f"{where}: {kind} is an empty list, expected a number")
    if kind == PROMISED and isinstance(value, dict):
        inside = [
            bound for k, v in _mapping(value, f"{where}: {kind}", filled=True).items() for bound in _bounds(k, v, where)
        ]
        if any(bound.kind in (NO_DROP, LOST, PROMISED) for bound in inside):
            raise ThresholdError(f"{where}: {PROMISED} takes a number, or bounds such as {{max_ratio_of_base: 0.8}}")
        return [replace(bound, if_promised=True) for bound in inside]
    return [_bound(kind, item, where) for item in items]


def _check_together(bounds: Sequence[Bound], where: str) -> None:
    """Raise ThresholdError for bounds that no value satisfies."""
    for low, high in (("min", "max"), ("min_ratio", "max_ratio"), OF_BASE):
        for of in dict.fromkeys(bound.of for bound in bounds):
            lows = [b.value for b in bounds if (b.kind, b.of) == (low, of)]
            highs = [b.value for b in bounds if (b.kind, b.of) == (high, of)]
            if lows and highs and max(lows) > min(highs):
                raise ThresholdError(f"{where}: {low} {max(lows):g} and {high} {min(highs):g}: no value satisfies both")


def _removes(rule: Rule, other: Rule) -> bool:
    """Return whether a rule without bounds can replace `other`."""
    overlaps = overlap(rule.composition, other.composition) and overlap(rule.metric, other.metric)
    return bool(other.bounds) and overlaps


def _bound(kind: str, given: Any, where: str) -> Bound:
    if kind == LOST:
        if not isinstance(given, str) or not given.strip():
            raise ThresholdError(f"{where}: {kind} is {given!r}, expected a reason in words")
        return Bound(kind, 0.0, note=given.strip())
    value, others = given, {}
    if isinstance(given, dict):
        if kind not in RELATIVE:
            raise ThresholdError(f"{where}: {kind} takes a number, not a reference")
        main, *keys = _KEYS.get(kind, ("value", "of"))
        if main not in given or set(given) - {main, *keys}:
            raise ThresholdError(f"{where}: {kind} is {given!r}, expected the keys {' and '.join((main, *keys))}")
        value, others = given[main], given
    of = others.get("of", BASE if kind in RELATIVE or kind in OF_BASE else None)
    level, effect, pool = others.get("level", LEVEL), others.get("effect"), others.get("pool", False)
    if isinstance(value, str) and kind in (LOSS, NOT_WORSE):
        found = _limit(f"n{value}" if kind == NOT_WORSE else value, f"{where}: {kind}")
        kind, value = found.kind, found.value
    if not isinstance(pool, bool):
        raise ThresholdError(f"{where}: pool is {pool!r}, expected true or false")
    if effect is not None and not (_is_number(effect) and effect > 0):
        raise ThresholdError(f"{where}: the effect is {effect!r}, expected a loss above 0, such as 0.02")
    if not _is_number(level) or not 0 < level < 1:
        raise ThresholdError(f"{where}: the level is {level!r}, expected one between 0 and 1, such as 0.05")
    if not _is_number(value):
        raise ThresholdError(f"{where}: {kind} is {value!r}, expected a number")
    if kind == NO_DROP and not 0 < value < 1:
        raise ThresholdError(f"{where}: {kind} is {value!r}, expected a level of significance such as 0.05")
    if value <= 0 and "ratio" in kind:
        raise ThresholdError(f"{where}: {kind} is {value!r}, expected a number above 0")
    if value <= 0 and kind.startswith(NOT_WORSE):
        raise ThresholdError(f"{where}: {NOT_WORSE} is {value!r}, expected a margin above 0, such as 0.02 or 5%")
    if value < 0 and (kind in ("max_drop", "max_rise", PROMISED) or kind.startswith(LOSS)):
        raise ThresholdError(f"{where}: {kind} is {value!r}, expected a number of at least 0")
    effect = None if effect is None else float(effect)
    return Bound(kind, float(value), _reference(of, where), level=float(level), effect=effect, pool=pool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _reference(of: Any, where: str) -> str | None:
    """Check and return the name of a reference; ids in their canonical form."""
    if of is None:
        return None
    if isinstance(of, str) and of in _REFERENCES:
        return of
    known = f"{', '.join(_REFERENCES)}, or the id of a composition"
    try:
        return str(parse(of))
    except (CompositionError, AttributeError, TypeError) as error:
        raise ThresholdError(f"{where}: of is {of!r}, expected {known}: {error}") from None


def _limit(text: str, where: str) -> Bound:
    """Return the bound of a limit such as 5%, without its reference."""
    match = _LIMIT.fullmatch(text.strip())
    allowed = {None: ("%", "se", None), "p": (None,), "n": ("%", None)}
    if match is None or match["unit"] not in allowed[match["sign"]] or (match["pool"] and not match["sign"]):
        raise ThresholdError(f"{where}: the limit is {text.strip()!r}, expected {_LIMITS}")
    value, pool = float(match["number"]), match["pool"] is not None
    if match["sign"] == "p":
        if not 0 < value < 1:
            raise ThresholdError(f"{where}: the level is {value:g}, expected one between 0 and 1, such as p0.01")
        return Bound(NO_DROP, value, pool=pool)
    if match["sign"] == "n":
        if value == 0:
            raise ThresholdError(f"{where}: the limit is {text.strip()!r}, expected a margin above 0, such as n0.02")
        return Bound(NOT_WORSE_PERCENT if match["unit"] else NOT_WORSE, value, pool=pool)
    if match["unit"] == "se" and value == 0:
        raise ThresholdError(f"{where}: the limit is {text.strip()!r}, expected standard errors above 0, such as 3se")
    return Bound({None: LOSS, "%": LOSS_PERCENT, "se": LOSS_ERRORS}[match["unit"]], value)


def _mapping(value: Any, where: str, *, filled: bool = False) -> Mapping[str, Any]:
    if filled and value == {}:
        raise ThresholdError(f"{where}: empty; add at least one rule")
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ThresholdError(f"{where}: expected a mapping with text keys, found {value!r}")
    return value


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """A safe loader that rejects duplicate keys, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is defined twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


# YAML 1.1 reads 1e-6 as text, and 1:30 as the number 90.
_UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
