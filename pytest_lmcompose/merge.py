"""Join the reports of the shards of a run, or of runs of other compositions, into one. No pytest, no torch.

Only what was found on the same model, with the same seeds, settings, data and versions, belongs in one
report. What spans compositions, paired gates after Holm and composability, is computed anew from all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_lmcompose.merge_checks import Report, interrupted, missing, parts, problems
from pytest_lmcompose.report.json import Collected
from pytest_lmcompose.report.planned import Plan, idle, rules_in, untested

TOLERANCE = 1e-5
"""Relative difference between numbers measured twice that counts as rounding: shards run on different machines."""
_NOT_OF_THE_WHOLE = ("shard", "stored", "comparison", "drift", "plan")
"""Sections that say something of one report among others: `lmcompose compare` says it of the joined one."""
_PARTIAL = "--partial joins what is there"


class MergeError(ValueError):
    """Reports that do not belong together; the message has a line for each problem, with the files and what differs."""


@dataclass(frozen=True)
class Merged:
    """What came out."""

    document: dict[str, Any]
    late: tuple[str, ...]
    """Messages of paired gates that fail only now that all are judged together."""
    idle: tuple[str, ...]
    """Expressions of the command line that judged nothing in any of the reports."""


def merge(reports: Mapping[str, Report], *, partial: bool = False, tolerance: float = TOLERANCE) -> Merged:
    """Return one report of all `reports`, which are named by their files; none of them is changed.

    Of a composition that several hold, such as the base model, the fuller record is kept. With `partial`,
    shards may be missing or interrupted, and compositions untested: then the report is one of an interrupted run.
    Raises MergeError.
    """
    found = list(dict.fromkeys(problems(reports, tolerance)))
    if found:
        raise MergeError("\n".join(found))
    first = next(iter(reports.values()))
    collected = Collected(prompts=_prompts(reports))
    for report in reports.values():
        for record in report["compositions"]:
            collected.add(copy.deepcopy(report["model"]), copy.deepcopy(record))
        collected.model = collected.model or copy.deepcopy(report["model"])
    records = list(collected.records.values())
    plan = _plan(reports)
    gone = missing(reports)
    left = [f"{part} is missing: nothing tells what it found ({_PARTIAL})" for part in gone]
    left += [f"{name} was interrupted: run it again ({_PARTIAL})" for name in interrupted(reports)]
    if plan is not None and not left:
        left = [f"{line} ({_PARTIAL})" for line in untested(plan, records)]
    if left and not partial:
        raise MergeError("\n".join(left))
    collected.complete(first["seed"], part=bool(gone))
    document = {
        **{key: value for key, value in copy.deepcopy(dict(first)).items() if key not in _NOT_OF_THE_WHOLE},
        "status": "interrupted" if left else "finished",
        "started": min(report["started"] for report in reports.values()),
        "finished": max(report["finished"] for report in reports.values()),
        **({} if plan is None else {"plan": copy.deepcopy(dict(plan))}),
        "model": collected.model,
        "compositions": list(collected.records.values()),
        "composability": collected.composability,
        "prompts": collected.prompts,
        **_unused_rules(reports),
        "merged": [copy.deepcopy(part) for report in reports.values() for part in parts(report)],
    }
    nothing = () if plan is None or left else tuple(idle(rules_in(plan), document["compositions"]))
    return Merged(document, tuple(collected.late), nothing)


def _plan(reports: Mapping[str, Report]) -> Plan | None:
    """Return what all runs together set out to test, where all of them say it."""
    plans = [report.get("plan") for report in reports.values()]
    if any(plan is None for plan in plans):
        return None
    known = [plan for plan in plans if plan is not None]
    return {
        **known[0],
        "compositions": sorted({name for plan in known for name in plan["compositions"]}),
        "judged": sorted({name for plan in known for name in plan["judged"]}),
        "steps": {step: settings for plan in known for step, settings in plan["steps"].items()},
    }


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
