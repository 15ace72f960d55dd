"""Join the reports of the shards of a run, or of runs of other compositions, into one. No pytest, no torch.

Only what was found on the same model, with the same seeds, settings, data and versions, belongs in one
report. What spans compositions, paired gates after Holm and composability, is computed anew from all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_lmcompose.baseline.compare import circumstances
from pytest_lmcompose.report.json import Collected
from pytest_lmcompose.report.record import Measured, Record, by_metric, runs_of

Report = Mapping[str, Any]
"""A report document, as plain data."""
TOLERANCE = 1e-5
"""Relative difference between numbers measured twice that counts as rounding: shards run on different machines."""
_WEIGHTS = ("weight_hash", "dtype", "device")
"""Of a model, what must be the same; a folder may have another name on another machine."""
_NOT_OF_THE_WHOLE = ("shard", "stored", "comparison", "drift")
"""Sections that say something of one report among others: `lmcompose compare` says it of the joined one."""
_OF_A_PART = ("status", "started", "finished", "shard", "environment")


class MergeError(ValueError):
    """Reports that do not belong together; the message names both files and what differs."""


@dataclass(frozen=True)
class Merged:
    """What came out."""

    document: dict[str, Any]
    late: tuple[str, ...]
    """Messages of paired gates that fail only now that all are judged together."""


def merge(reports: Mapping[str, Report], *, partial: bool = False, tolerance: float = TOLERANCE) -> Merged:
    """Return one report of all `reports`, which are named by their files; none of them is changed.

    Of a composition that several hold, such as the base model, the fuller record is kept. With `partial`,
    shards may be missing: then the report is one of an interrupted run.
    Raises MergeError.
    """
    names = list(reports)
    first = reports[names[0]]
    for name in names[1:]:
        _check_circumstances(names[0], first, name, reports[name])
    missing = _missing(reports)
    if missing and not partial:
        raise MergeError(f"{', '.join(missing)} missing: nothing tells what it found (--partial joins the others)")
    collected = Collected(prompts=_prompts(reports))
    holders: dict[str, str] = {}
    settings: dict[str, tuple[str, Any]] = {}
    for name, report in reports.items():
        for record in report["compositions"]:
            _check_settings(settings, name, record)
            before = collected.records.get(record["id"])
            if before is not None:
                _check_duplicate(holders[record["id"]], before, name, record, tolerance)
            collected.add(copy.deepcopy(report["model"]), copy.deepcopy(record))
            holders.setdefault(record["id"], name)
        collected.model = collected.model or copy.deepcopy(report["model"])
    collected.complete(first["seed"], part=bool(missing))
    stopped = missing or any(report["status"] != "finished" for report in reports.values())
    document = {
        **{key: value for key, value in copy.deepcopy(dict(first)).items() if key not in _NOT_OF_THE_WHOLE},
        "status": "interrupted" if stopped else "finished",
        "started": min(report["started"] for report in reports.values()),
        "finished": max(report["finished"] for report in reports.values()),
        "model": collected.model,
        "compositions": list(collected.records.values()),
        "composability": collected.composability,
        "prompts": collected.prompts,
        **_unused_rules(reports),
        "merged": [copy.deepcopy(part) for report in reports.values() for part in _parts(report)],
    }
    return Merged(document, tuple(collected.late))


def _parts(report: Report) -> list[dict[str, Any]]:
    """Return what a report was joined from, or itself as such a part."""
    found: list[dict[str, Any]] | None = report.get("merged")
    return found if found is not None else [{key: report[key] for key in _OF_A_PART if key in report}]


def _missing(reports: Mapping[str, Report]) -> list[str]:
    """Return the shards that are not there; raises MergeError for shards of other numbers."""
    shards = [(name, part["shard"]) for name, report in reports.items() for part in _parts(report) if "shard" in part]
    if not shards:
        return []
    (first, one), count = shards[0], shards[0][1]["count"]
    for name, other in shards:
        if other["count"] != count:
            raise MergeError(
                f"{first} is shard {one['index']} of {count} and {name} is shard {other['index']} of "
                f"{other['count']}: they are parts of different divisions"
            )
    there = {shard["index"] for _, shard in shards}
    return [f"shard {index} of {count}" for index in range(1, count + 1) if index not in there]


def _check_circumstances(one: str, first: Report, other: str, second: Report) -> None:
    if first["schema_version"] != second["schema_version"]:
        _refuse(one, other, f"report schema: {first['schema_version']} -> {second['schema_version']}")
    found = circumstances(_placeless(first), _placeless(second))
    if found:
        _refuse(one, other, "; ".join(f"{difference.what}: {difference.message}" for difference in found))


def _placeless(report: Report) -> Report:
    """Return a report whose model is known by its weights and kind of device alone."""
    model = report["model"]
    if model is None:
        return report
    known = {key: model[key] for key in _WEIGHTS}
    return {**report, "model": {**known, "device": model["device"].partition(":")[0]}}


def _check_settings(seen: dict[str, tuple[str, Any]], name: str, record: Record) -> None:
    """Make sure that a step has the same settings wherever it stands."""
    for step in record["steps"]:
        other, settings = seen.setdefault(step["id"], (name, step["settings"]))
        if settings != step["settings"]:
            keys = [key for key in step["settings"] if settings.get(key) != step["settings"][key]]
            changes = ", ".join(f"{key}: {settings.get(key)} -> {step['settings'][key]}" for key in keys)
            _refuse(other, name, f"settings of {step['id']}: {changes}")


def _check_duplicate(one: str, before: Record, other: str, record: Record, tolerance: float) -> None:
    """Make sure that two records of a composition tell the same, as far as both tell something."""
    states = {before["status"], record["status"]}
    if states == {"measured", "failed"}:
        failed, where = (before, one) if before["status"] == "failed" else (record, other)
        _refuse(one, other, f"{record['id']} failed in {where} ({failed['error']}); run that one again")
    if states == {"measured"}:
        for problem in _differences(before, record, tolerance):
            _refuse(one, other, f"{record['id']} was measured twice, with different results: {problem}")


def _differences(one: Record, other: Record, tolerance: float) -> Iterator[str]:
    before, after = by_metric(one), by_metric(other)
    if alone := sorted(before.keys() ^ after.keys()):
        yield f"only one has {', '.join(alone)}"
    for metric in before.keys() & after.keys():
        runs = list(runs_of(before[metric])), list(runs_of(after[metric]))
        same = len(runs[0]) == len(runs[1]) and all(_same(a, b, tolerance) for a, b in zip(*runs, strict=True))
        if not same:
            yield f"{metric} is {before[metric]['value']} and {after[metric]['value']}"
    bounds = [
        {(gate["metric"], gate["gate"], gate["threshold"]) for gate in record["gates"]} for record in (one, other)
    ]
    if all(bounds) and bounds[0] != bounds[1]:
        metric, gate, threshold = sorted(bounds[0] ^ bounds[1], key=str)[0]
        yield f"only one has the gate {metric} {gate} {threshold}"


def _same(one: Measured, other: Measured, tolerance: float) -> bool:
    numbers = [(m["value"], *m["samples"]) for m in (one, other)]
    if len(numbers[0]) != len(numbers[1]) or one["n"] != other["n"]:
        return False
    return all(
        x == y if x is None or y is None else math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance)
        for x, y in zip(*numbers, strict=True)
    )


def _prompts(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Return what the samples of all reports asked, each metric of each seed once."""
    asked: dict[tuple[int, tuple[str, ...]], dict[str, None]] = {}
    for entry in (entry for report in reports.values() for entry in report.get("prompts", ())):
        asked.setdefault((entry["seed"], tuple(entry["texts"])), {}).update(dict.fromkeys(entry["metrics"]))
    return [{"seed": seed, "metrics": list(m), "texts": list(texts)} for (seed, texts), m in asked.items()]


def _unused_rules(reports: Mapping[str, Report]) -> dict[str, list[Any]]:
    """Return the rules that judged nothing in any of the reports, as one that tested what they cover tells them."""
    told = [report["unused_rules"] for report in reports.values() if "unused_rules" in report]
    if not told:
        return {}
    names = [{(rule["composition"], rule["metric"]) for rule in rules} for rules in told]
    unused: dict[tuple[str, str], dict[str, Any]] = {}
    for rule in (rule for rules in told for rule in rules):
        key = rule["composition"], rule["metric"]
        if key in set.intersection(*names) and (key not in unused or rule["tested"] > unused[key]["tested"]):
            unused[key] = rule
    return {"unused_rules": copy.deepcopy(list(unused.values()))}


def _refuse(one: str, other: str, what: str) -> None:
    raise MergeError(f"{one} and {other} do not belong together: {what}")
