"""What a run sets out to test, before it is divided into shards, and by which rules: the report's section `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interventions.names import near_names
from pytest_lmcompose.composition import BASE, parse
from pytest_lmcompose.gates.thresholds import Bound, Rule, compares_with
from pytest_lmcompose.report.record import Record

if TYPE_CHECKING:
    from pytest_lmcompose.baseline.reference import Baseline
    from pytest_lmcompose.plan import Planned
    from pytest_lmcompose.recipe import Recipe

Plan = Mapping[str, Any]
"""The section, as plain data."""
_NAMED = 3
"""Compositions that a message names."""


def plan_section(planned: Planned, rules: Sequence[Rule], recipe: Recipe, baseline: Baseline | None) -> dict[str, Any]:
    """Return the section of a run; the settings of all its steps are those of the recipe."""
    compositions = [parse(name) for name in planned.tested]
    compositions += [other for one in compositions for other in compares_with(rules, one)]
    steps = dict.fromkeys(step for composition in compositions for step in composition.steps)
    return {
        "compositions": sorted(planned.tested),
        "judged": sorted(planned.judged),
        "rules": [dataclasses.asdict(rule) for rule in rules],
        "steps": {str(step): dataclasses.asdict(recipe.settings(step)) for step in steps},
        "baseline": None if baseline is None else {"file": baseline.path.name, "started": baseline.document["started"]},
    }


def rules_in(plan: Plan) -> tuple[Rule, ...]:
    """Return the rules of a plan."""
    return tuple(
        Rule(rule["composition"], rule["metric"], tuple(map(_bound, rule["bounds"])), rule["source"])
        for rule in plan["rules"]
    )


def idle(rules: Iterable[Rule], records: Sequence[Record]) -> list[str]:
    """Return the expressions of the command line that judged nothing in any of `records`."""

    def judged(rule: Rule) -> bool:
        gates = (gate for record in records if rule.covers(record["id"]) for gate in record["gates"])
        return any(rule.judges(gate["metric"]) or gate["metric"] == rule.metric for gate in gates)

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
        gone = [name for name in judged_in(baseline.document) if rule.covers(name) and name not in tested]
        if rule.source and gone:
            named = ", ".join(gone[:_NAMED]) + ", ..." * (len(gone) > _NAMED)
            yield (
                f"{_flag(rule)}: {baseline.name} has {named}, and no test is about that: test it, name what is "
                "compared, as in COMPOSITION::METRIC:LIMIT, or take a new baseline by --lmcompose-update-baseline"
            )


def judged_in(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the compositions that a stored run judged; of one without gates, all but the base model."""
    if (plan := document.get("plan")) is not None:
        return tuple(plan["judged"])
    records = document["compositions"]
    return tuple(r["id"] for r in records if r["gates"]) or tuple(r["id"] for r in records if r["id"] != BASE)


def untested(plan: Plan, records: Sequence[Record]) -> list[str]:
    """Return a line for each composition of a plan that nobody tested, or that nobody judged."""
    by_id = {record["id"]: record for record in records}
    rules = [rule for rule in rules_in(plan) if rule.bounds]
    found = []
    for name in plan["compositions"]:
        record = by_id.get(name)
        if record is None or record["status"] not in ("measured", "failed", "built"):
            found.append(f"nobody tested {name}")
        elif record["status"] == "measured" and not record["gates"] and name in plan["judged"]:
            found += [f"nobody judged {name}, though thresholds hold for it"] * any(r.covers(name) for r in rules)
    return found


def _flag(rule: Rule) -> str:
    return f"--lmcompose-compare-fail={rule.source!r}"


def _bound(fields: Mapping[str, Any]) -> Bound:
    return Bound(fields["kind"], fields["value"], fields["of"], fields.get("note", ""))
