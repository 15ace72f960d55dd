"""The report's section `plan`: the compositions and rules of the whole run, before sharding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from interventions.names import near_names
from interventions.ranges import plain_settings
from pytest_lmcompose.composition import BASE, parse
from pytest_lmcompose.gate.thresholds import Rule, compares_with
from pytest_lmcompose.plan import needed
from pytest_lmcompose.results import BaselineFile, CompositionResult, Plan, Report

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.reference import Baseline
    from pytest_lmcompose.plan import Planned
    from pytest_lmcompose.recipe import Recipe

_NAMED = 3
"""Maximum number of compositions named in a message."""


def plan_section(planned: Planned, rules: Sequence[Rule], recipe: Recipe, baseline: Baseline | None) -> Plan:
    """Return the section `plan`, with the recipe's settings of every step."""
    compositions = [parse(name) for name in planned.tested]
    compositions += [other for one in compositions for other in compares_with(rules, one)]
    states = (state for composition in compositions for state in needed(composition, recipe.reads))
    steps = dict.fromkeys(state.steps[-1] for state in states)
    return Plan(
        tuple(sorted(planned.tested)),
        tuple(sorted(planned.judged)),
        tuple(rules),
        {str(step): plain_settings(recipe.settings(step)) for step in steps},
        None if baseline is None else BaselineFile(baseline.path.name, baseline.report.started),
    )


def idle(rules: Iterable[Rule], records: Sequence[CompositionResult]) -> list[str]:
    """Return the --lmcompose-compare-fail expressions that judged nothing in `records`."""

    def judged(rule: Rule) -> bool:
        gates = (gate for record in records if rule.covers(record.id) for gate in record.gates)
        return any(rule.judges(gate.metric) or gate.metric == rule.metric for gate in gates)

    return [rule.source for rule in rules if rule.source and not judged(rule)]


def unmatched(rules: Iterable[Rule], judged: Sequence[str]) -> Iterator[str]:
    """Yield a message for each --lmcompose-compare-fail expression that matches no judged composition."""
    for rule in rules:
        if rule.source and not any(rule.covers(name) for name in judged):
            hint = near_names(rule.composition, judged)
            yield f"{_flag(rule)}: matches no composition that a test judges.{hint}"


def dropped(rules: Iterable[Rule], tested: Sequence[str], baseline: Baseline) -> Iterator[str]:
    """Yield a message for each expression that covers a composition of the baseline without a test in this run."""
    for rule in rules:
        gone = [name for name in judged_in(baseline.report) if rule.covers(name) and name not in tested]
        if rule.source and gone:
            named = ", ".join(gone[:_NAMED]) + ", ..." * (len(gone) > _NAMED)
            yield (
                f"{_flag(rule)}: {baseline.name} has {named}, which no test covers; add a test, restrict the rule "
                "(COMPOSITION::METRIC:LIMIT), or update the baseline with --lmcompose-update-baseline"
            )


def judged_in(report: Report) -> tuple[str, ...]:
    """Return the compositions that a stored run judged; without gates, all but the base model."""
    if report.plan is not None:
        return report.plan.judged
    records = report.compositions
    return tuple(r.id for r in records if r.gates) or tuple(r.id for r in records if r.id != BASE)


def untested(plan: Plan, records: Sequence[CompositionResult]) -> list[str]:
    """Return a message for each planned composition that was not tested or not judged."""
    by_id = {record.id: record for record in records}
    rules = [rule for rule in plan.rules if rule.bounds]
    found = []
    for name in plan.compositions:
        record = by_id.get(name)
        if record is None or record.status not in ("measured", "failed", "built"):
            found.append(f"{name} was not tested")
        elif record.status == "measured" and not record.gates and name in plan.judged:
            found += [f"{name} was not judged, but has thresholds"] * any(r.covers(name) for r in rules)
    return found


def _flag(rule: Rule) -> str:
    return f"--lmcompose-compare-fail={rule.source!r}"
