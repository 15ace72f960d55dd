"""Merge the reports of the shards of a run, or of runs of different compositions. Imports no pytest and no torch.

The reports must have the same model, seeds, settings, data and versions. Results that span compositions (Holm's
correction of paired gates, and composability) are computed again from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytest_lmcompose.gate.thresholds import NOT_JUDGED, Unused
from pytest_lmcompose.merge_checks import interrupted, missing, parts, problems
from pytest_lmcompose.report.collect import Collected
from pytest_lmcompose.report.planned import idle, untested
from pytest_lmcompose.results import Message, Plan, Prompts, Report, replace

TOLERANCE = 1e-5
"""Relative difference that counts as rounding between machines, for numbers measured twice."""
_PARTIAL = "--partial merges the rest"


class MergeError(ValueError):
    """Reports cannot be merged; the message has a line for each problem, with the files and the difference."""


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    report: Report
    late: tuple[str, ...]
    """Messages of paired gates that fail only after Holm's correction over all reports."""
    idle: tuple[str, ...]
    """Expressions from the command line that applied to nothing in any report."""


def merge(reports: Mapping[str, Report], *, partial: bool = False, tolerance: float = TOLERANCE) -> Merged:
    """Merge `reports`, given by file name, into a new report.

    If several reports have a composition, such as the base model, the fuller record is kept. With `partial`, shards may
    be missing or interrupted, and compositions untested: then the result is the report of an interrupted run. Raises
    MergeError.
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
    left = [f"{part} is missing ({_PARTIAL})" for part in gone]
    left += [f"{name} was interrupted: run it again ({_PARTIAL})" for name in interrupted(reports)]
    if plan is not None and not left:
        left = [f"{line} ({_PARTIAL})" for line in untested(plan, collected.results)]
    if left and not partial:
        raise MergeError("\n".join(left))
    collected.complete(first.seed, part=bool(gone))
    # Comparisons and drift of single reports do not apply; run `lmcompose compare` on the merged one.
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
    off = [(rule.composition, rule.metric) for rule in report.unused_rules or () if rule.reason.startswith(NOT_JUDGED)]
    rules = () if plan is None or left else [r for r in plan.rules if (r.composition, r.metric) not in off]
    nothing = tuple(idle(rules, report.compositions))
    return Merged(report, collected.late, nothing)


def _plan(reports: Mapping[str, Report]) -> Plan | None:
    """Return the joint plan of all runs, None if a report has no plan."""
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
    """Return the prompts of all reports, without duplicates."""
    metrics_of: dict[tuple[int, tuple[str, ...]], dict[str, None]] = {}
    for entry in (entry for report in reports.values() for entry in report.prompts):
        metrics_of.setdefault((entry.seed, entry.texts), {}).update(dict.fromkeys(entry.metrics))
    return tuple(Prompts(seed, tuple(metrics), texts) for (seed, texts), metrics in metrics_of.items())


def _unused_rules(reports: Mapping[str, Report]) -> tuple[Unused, ...] | None:
    """Return the rules that applied to nothing in any report, with the most specific reason."""
    listed = [report.unused_rules for report in reports.values() if report.unused_rules is not None]
    if not listed:
        return None
    everywhere = set.intersection(*({(rule.composition, rule.metric) for rule in rules} for rules in listed))
    unused: dict[tuple[str, str], Unused] = {}
    for rule in (rule for rules in listed for rule in rules):
        key = rule.composition, rule.metric
        if key in everywhere and (key not in unused or rule.tested > unused[key].tested):
            unused[key] = rule
    return tuple(unused.values())
