"""Join the reports of the shards of a run, or of runs of other compositions, into one. No pytest, no torch.

Only what was found on the same model, with the same seeds, settings, data and versions, belongs in one
report. What spans compositions, paired gates after Holm and composability, is computed anew from all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytest_lmcompose.gate.thresholds import Unused
from pytest_lmcompose.merge_checks import interrupted, missing, parts, problems
from pytest_lmcompose.report.collect import Collected
from pytest_lmcompose.report.planned import idle, untested
from pytest_lmcompose.results import Message, Plan, Prompts, Report, replace

TOLERANCE = 1e-5
"""Relative difference between numbers measured twice that counts as rounding: shards run on different machines."""
_PARTIAL = "--partial joins what is there"


class MergeError(ValueError):
    """Reports that do not belong together; the message has a line for each problem, with the files and what differs."""


@dataclass(frozen=True)
class Merged:
    """What came out."""

    report: Report
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
        for record in report.compositions:
            collected.add(Message(report.model, record))
        collected.model = collected.model or report.model
    plan = _plan(reports)
    gone = missing(reports)
    left = [f"{part} is missing: nothing tells what it found ({_PARTIAL})" for part in gone]
    left += [f"{name} was interrupted: run it again ({_PARTIAL})" for name in interrupted(reports)]
    if plan is not None and not left:
        left = [f"{line} ({_PARTIAL})" for line in untested(plan, collected.results)]
    if left and not partial:
        raise MergeError("\n".join(left))
    collected.complete(first.seed, part=bool(gone))
    # What says something of one report among others, `lmcompose compare` says of the joined one.
    report = replace(
        first,
        status="interrupted" if left else "finished",
        started=min(report.started for report in reports.values()),
        finished=max(report.finished for report in reports.values()),
        shard=None,
        stored=None,
        comparison=None,
        drift=None,
        plan=plan,
        model=collected.model,
        compositions=collected.results,
        composability=collected.composability,
        prompts=collected.prompts,
        unused_rules=_unused_rules(reports),
        merged=tuple(part for report in reports.values() for part in parts(report)),
    )
    nothing = () if plan is None or left else tuple(idle(plan.rules, report.compositions))
    return Merged(report, collected.late, nothing)


def _plan(reports: Mapping[str, Report]) -> Plan | None:
    """Return what all runs together set out to test, where all of them say it."""
    known = [report.plan for report in reports.values() if report.plan is not None]
    if len(known) < len(reports):
        return None
    return replace(
        known[0],
        compositions=tuple(sorted({name for plan in known for name in plan.compositions})),
        judged=tuple(sorted({name for plan in known for name in plan.judged})),
        steps={step: settings for plan in known for step, settings in plan.steps.items()},
    )


def _prompts(reports: Mapping[str, Report]) -> tuple[Prompts, ...]:
    """Return what the samples of all reports asked, each metric of each seed once."""
    asked: dict[tuple[int, tuple[str, ...]], dict[str, None]] = {}
    for entry in (entry for report in reports.values() for entry in report.prompts):
        asked.setdefault((entry.seed, entry.texts), {}).update(dict.fromkeys(entry.metrics))
    return tuple(Prompts(seed, tuple(metrics), texts) for (seed, texts), metrics in asked.items())


def _unused_rules(reports: Mapping[str, Report]) -> tuple[Unused, ...] | None:
    """Return the rules that judged nothing in any of the reports, as one that tested what they cover tells them."""
    told = [report.unused_rules for report in reports.values() if report.unused_rules is not None]
    if not told:
        return None
    everywhere = set.intersection(*({(rule.composition, rule.metric) for rule in rules} for rules in told))
    unused: dict[tuple[str, str], Unused] = {}
    for rule in (rule for rules in told for rule in rules):
        key = rule.composition, rule.metric
        if key in everywhere and (key not in unused or rule.tested > unused[key].tested):
            unused[key] = rule
    return tuple(unused.values())
