"""What a run sets out to test, before it is divided into shards, and by which rules: the report's section `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from interventions.names import near_names
from pytest_lmcompose.composition import BASE, parse
from pytest_lmcompose.gate.thresholds import Rule, compares_with
from pytest_lmcompose.results import BaselineFile, CompositionResult, Plan, Report

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.reference import Baseline
    from pytest_lmcompose.plan import Planned
    from pytest_lmcompose.recipe import Recipe

_NAMED = 3
"""Compositions that a message names."""


def plan_section(planned: Planned, rules: Sequence[Rule], recipe: Recipe, baseline: Baseline | None) -> Plan:
    """Return the section of a run; the settings of all its steps are those of the recipe."""
    compositions = [parse(name) for name in planned.tested]
    compositions += [other for one in compositions for other in compares_with(rules, one)]
    steps = dict.fromkeys(step for composition in compositions for step in composition.steps)
    return Plan(
        tuple(sorted(planned.tested)),
        tuple(sorted(planned.judged)),
        tuple(rules),
        {str(step): dataclasses.asdict(recipe.settings(step)) for step in steps},
        None if baseline is None else BaselineFile(baseline.path.name, baseline.report.started),
    )


def idle(rules: Iterable[Rule], records: Sequence[CompositionResult]) -> list[str]:
    """Return the expressions of the command line that judged nothing in any of `records`."""

    def judged(rule: Rule) -> bool:
        gates = (gate for record in records if rule.covers(record.id) for gate in record.gates)
        return any(rule.judges(gate.metric) or gate.metric == rule.metric for gate in gates)

    return [rule.source for rule in rules if rule.source and not judged(rule)]


def unmatched(rules: Iterable[Rule], judged: Sequence[str]) -> Iterator[str]:
    """Yield which expressions of the command line match no composition that a test judges."""
    for rule in rules:
        if rule.source and not any(rule.covers(name) for name in judged):
            hint = near_names(rule.composition, judged)
            yield f"{_flag(rule)}: no composition whose test asks for gates matches.{hint}"


def dropped(rules: Iterable[Rule], tested: Sequence[str], baseline: Baseline) -> Iterator[str]:
    """Yield which expressions of the command line hold for a composition of the stored run that nobody tests now."""
    for rule in rules:
        gone = [name for name in judged_in(baseline.report) if rule.covers(name) and name not in tested]
        if rule.source and gone:
            named = ", ".join(gone[:_NAMED]) + ", ..." * (len(gone) > _NAMED)
            yield (
                f"{_flag(rule)}: {baseline.name} has {named}, and no test is about that: test it, name what is "
                "compared, as in COMPOSITION::METRIC:LIMIT, or take a new baseline by --lmcompose-update-baseline"
            )


def judged_in(report: Report) -> tuple[str, ...]:
    """Return the compositions that a stored run judged; of one without gates, all but the base model."""
    if report.plan is not None:
        return report.plan.judged
    records = report.compositions
    return tuple(r.id for r in records if r.gates) or tuple(r.id for r in records if r.id != BASE)


def untested(plan: Plan, records: Sequence[CompositionResult]) -> list[str]:
    """Return a line for each composition of a plan that nobody tested, or that nobody judged."""
    by_id = {record.id: record for record in records}
    rules = [rule for rule in plan.rules if rule.bounds]
    found = []
    for name in plan.compositions:
        record = by_id.get(name)
        if record is None or record.status not in ("measured", "failed", "built"):
            found.append(f"nobody tested {name}")
        elif record.status == "measured" and not record.gates and name in plan.judged:
            found += [f"nobody judged {name}, though thresholds hold for it"] * any(r.covers(name) for r in rules)
    return found


def _flag(rule: Rule) -> str:
    return f"--lmcompose-compare-fail={rule.source!r}"
