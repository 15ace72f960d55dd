"""Check whether reports can be merged; one line per problem. Imports no pytest and no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_lmcompose.baseline.compare import circumstances, given
from pytest_lmcompose.distribute.shard import Shard
from pytest_lmcompose.gate.thresholds import Rule
from pytest_lmcompose.results import CompositionResult, Outcome, Part, Plan, Report, replace
from pytest_lmcompose.texts import first_names

_NAMED = 3
"""Number of compositions that a message names."""


def problems(reports: Mapping[str, Report], tolerance: float) -> Iterator[str]:
    """Yield why `reports`, given by file name, cannot be merged."""
    first = next((name for name, report in reports.items() if report.model is not None), next(iter(reports)))
    for name, report in reports.items():
        if name != first:
            for problem in _circumstances(reports[first], report):
                yield _apart(first, name, problem)
    yield from _divisions(reports)
    yield from _plans(reports)
    yield from _results(reports, tolerance)


def missing(reports: Mapping[str, Report]) -> list[str]:
    """Return the missing shards."""
    shards = [shard for report in reports.values() for shard in _shards(report)]
    if not shards:
        return []
    there = {shard.index for shard in shards}
    count = shards[0].count
    return [f"shard {index} of {count}" for index in range(1, count + 1) if index not in there]


def interrupted(reports: Mapping[str, Report]) -> list[str]:
    """Return the names of reports with interrupted runs."""
    return [name for name, found in reports.items() if any(part.status != "finished" for part in parts(found))]


def parts(report: Report) -> tuple[Part, ...]:
    """Return the parts that a report was merged from; a single run is its own part."""
    own = Part(report.status, report.started, report.finished, report.environment, report.shard)
    return report.merged or (own,)


def _shards(report: Report) -> list[Shard]:
    """Return the shards in a report; none for a whole run, and for one merged from all its shards."""
    found = [part.shard for part in parts(report) if part.shard is not None]
    whole = bool(found) and {shard.index for shard in found} == set(range(1, found[0].count + 1))
    return [] if whole else found


def _divisions(reports: Mapping[str, Report]) -> Iterator[str]:
    """Yield differing numbers of shards, duplicate shards, and whole runs among shards."""
    shards = [(name, shard) for name, report in reports.items() for shard in _shards(report)]
    if not shards:
        return
    (first, one), holders = shards[0], dict[int, str]()
    for name, shard in shards:
        if shard.count != one.count:
            yield f"{first} is one of {one.count} shards and {name} is one of {shard.count}"
        elif (other := holders.setdefault(shard.index, name)) != name:
            yield f"{other} and {name} are both shard {shard.index} of {shard.count}"
    for name, report in reports.items():
        if not _shards(report):
            yield f"{first} is a shard of a run and {name} is a whole run"


def _plans(reports: Mapping[str, Report]) -> Iterator[str]:
    """Yield differences between plans: all runs need the same rules, shards also the same compositions."""
    known = {name: report.plan for name, report in reports.items() if report.plan is not None}
    for name, report in reports.items():
        if name not in known and _shards(report):
            yield f"{name} does not say what the whole run tests; run it again with this version"
    if not known:
        return
    first, one = next(iter(known.items()))
    for name, other in known.items():
        for problem in _plan(one, other, shards=bool(_shards(reports[first]) and _shards(reports[name]))):
            yield _apart(first, name, problem)


def _plan(one: Plan, other: Plan, *, shards: bool) -> Iterator[str]:
    for key, title in (("compositions", "tests"), ("judged", "judges")) if shards else ():
        before, after = set(getattr(one, key)), set(getattr(other, key))
        if before != after:
            alone = [f"only the first {title} {_listed(before - after)}"] if before - after else []
            alone += [f"only the second {title} {_listed(after - before)}"] if after - before else []
            yield f"selection: {', '.join(alone)}"
    if one.rules != other.rules:
        yield f"thresholds: {_other_rule(one, other)}"
    for step in one.steps.keys() & other.steps.keys():
        if changes := list(_changes(one.steps[step], other.steps[step])):
            yield f"settings of {step}: {', '.join(changes)}"
    if one.baseline != other.baseline and shards:
        files = [str(None if plan.baseline is None else plan.baseline.file) for plan in (one, other)]
        yield f"compared with different stored runs: {files[0]} -> {files[1]}"


def _other_rule(one: Plan, other: Plan) -> str:
    before, after = ([_rule(rule) for rule in plan.rules] for plan in (one, other))
    for rules, others, which in ((before, after, "first"), (after, before, "second")):
        for rule in rules:
            if rule not in others:
                return f"only the {which} has {rule}"
    return "the same rules in another order"


def _rule(rule: Rule) -> str:
    bounds = [
        "promised " * b.if_promised + f"{b.kind} {b.value:g}" + (f" of {b.of}" if b.of else "") for b in rule.bounds
    ]
    return f"{rule.composition!r}: {rule.metric!r}: {', '.join(bounds) or 'no bound'}"


def _circumstances(first: Report, second: Report) -> Iterator[str]:
    if first.schema_version != second.schema_version:
        yield f"report schema: {first.schema_version} -> {second.schema_version}"
    for difference in circumstances(_placeless(first), _placeless(second)):
        yield f"{difference.what}: {difference.message}"


def _placeless(report: Report) -> Report:
    """Return a report without the model's name and location, and with only the kind of device."""
    model = report.model
    if model is None:
        return report
    known = replace(model, id="", location="", revision=None, device=model.device.partition(":")[0])
    return replace(report, model=known)


def _results(reports: Mapping[str, Report], tolerance: float) -> Iterator[str]:
    """Yield steps with different settings, and compositions with different results."""
    settings: dict[str, tuple[str, Mapping[str, Any]]] = {}
    records: dict[str, tuple[str, CompositionResult]] = {}
    for name, report in reports.items():
        for record in report.compositions:
            for step in record.steps:
                other, known = settings.setdefault(step.id, (name, given(step)))
                if changes := list(_changes(known, given(step))):
                    yield _apart(other, name, f"settings of {step.id}: {', '.join(changes)}")
            where, before = records.setdefault(record.id, (name, record))
            if before is not record:
                for problem in _duplicate(where, before, name, record, tolerance):
                    yield _apart(where, name, problem)


def _duplicate(
    one: str, before: CompositionResult, other: str, record: CompositionResult, tolerance: float
) -> Iterator[str]:
    """Yield contradictions between two records of a composition."""
    states = {before.status, record.status}
    if states == {"measured", "failed"}:
        failed, where = (before, one) if before.status == "failed" else (record, other)
        yield f"{record.id} failed in {where} ({failed.error}); run that one again"
    if states == {"measured"}:
        for problem in _differences(before, record, tolerance):
            yield f"{record.id} was measured twice, with different results: {problem}"


def _differences(one: CompositionResult, other: CompositionResult, tolerance: float) -> Iterator[str]:
    before, after = one.by_metric, other.by_metric
    if alone := sorted(before.keys() ^ after.keys()):
        yield f"only one has {', '.join(alone)}"
    for metric in sorted(before.keys() & after.keys()):
        runs = list(before[metric].runs), list(after[metric].runs)
        same = len(runs[0]) == len(runs[1]) and all(_same(a, b, tolerance) for a, b in zip(*runs, strict=True))
        if not same:
            yield f"{metric} is {before[metric].value} and {after[metric].value}"
            return
    bounds = [{(gate.metric, gate.gate, gate.threshold) for gate in record.gates} for record in (one, other)]
    if all(bounds) and bounds[0] != bounds[1]:
        metric, gate, threshold = sorted(bounds[0] ^ bounds[1], key=str)[0]
        yield f"only one has the gate {metric} {gate} {threshold}"


def _same(one: Outcome, other: Outcome, tolerance: float) -> bool:
    numbers = [(m.value, *m.samples) for m in (one, other)]
    if len(numbers[0]) != len(numbers[1]) or (one.n, one.nonfinite) != (other.n, other.nonfinite):
        return False
    return all(
        x == y if x is None or y is None else math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance)
        for x, y in zip(*numbers, strict=True)
    )


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*one, *other)):
        if one.get(key) != other.get(key):
            yield f"{key}: {one.get(key)} -> {other.get(key)}"


def _listed(names: set[str]) -> str:
    return first_names(sorted(names), _NAMED)


def _apart(one: str, other: str, what: str) -> str:
    return f"{one} and {other} do not belong together: {what}"
