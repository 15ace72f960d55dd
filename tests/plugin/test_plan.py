"""The plan of a run: its tree, order and arithmetic, against brute force."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmcompose.composition import Composition, Step, parse
from pytest_lmcompose.costs import Costs, StepCost, duration, size
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.plan import Plan, Remaining
from pytest_lmcompose.recipe import RecipeError, load_recipe

CONF = SUITE_FOLDER / "conf"

steps = st.builds(
    Step, st.sampled_from(["a", "b", "c", "d"]), st.sampled_from([(), (("bits", "3"),), (("bits", "4"),)])
)
compositions = st.lists(steps, max_size=4).map(lambda items: Composition(tuple(items)))
plans = st.lists(compositions, max_size=12)

COST = {"a": (2.0, 10), "b": (3.0, 7), "c": (5.0, 100)}
"""Of the methods; what d costs is not known."""


def costs() -> Costs:
    return Costs.of([StepCost(name, name, *cost) for name, cost in COST.items()], [1.5])


def states_of(wanted: list[Composition]) -> set[tuple[Step, ...]]:
    return {c.steps[:k] for c in wanted for k in range(1, len(c.steps) + 1)}


@given(plans)
def test_each_composition_is_tested_once_and_each_state_built_once(wanted: list[Composition]) -> None:
    plan = Plan.of(wanted)
    assert sorted(plan.order) == sorted(set(wanted))
    assert sorted(state.steps for state in plan.states) == sorted(states_of(wanted))
    assert plan.applications == len(states_of(wanted))
    assert plan.applications_from_scratch == sum(len(c.steps) for c in set(wanted))


@given(plans)
def test_the_order_keeps_those_that_share_a_state_together(wanted: list[Composition]) -> None:
    order = Plan.of(wanted).order
    for prefix in states_of(wanted):
        having = [c.steps[: len(prefix)] == prefix for c in order]
        assert [key for key, _ in itertools.groupby(having)].count(True) == 1
        if Composition(prefix) in order:
            assert having.index(True) == order.index(Composition(prefix))


@given(plans)
def test_a_process_that_drops_states_after_their_last_use_builds_none_twice(wanted: list[Composition]) -> None:
    plan = Plan.of(wanted)
    last_use = {prefix: composition for composition in plan.order for prefix in composition.prefixes()}
    held: dict[tuple[Step, ...], int] = {}
    applied = peak = 0
    seconds = 0.0
    for composition in plan.order:
        for k in range(1, len(composition.steps) + 1):
            prefix = composition.steps[:k]
            if prefix not in held:
                cost = COST.get(prefix[-1].method, (0.0, 0))
                held[prefix] = cost[1]
                applied += 1
                seconds += cost[0]
            peak = max(peak, sum(held.values()))
        held = {p: size for p, size in held.items() if last_use[Composition(p)] != composition}
    assert held == {}
    assert applied == plan.applications
    assert plan.peak_bytes(costs()) == peak
    assert plan.seconds(costs()) == pytest.approx(seconds + 1.5 * len(set(wanted)))


@given(plans, st.randoms())
def test_remaining_gives_a_state_up_with_its_last_test_in_any_order(wanted: list[Composition], random: object) -> None:
    uses = [*wanted, *wanted[:3]]
    random.shuffle(uses)  # type: ignore[attr-defined]
    remaining = Remaining(uses)
    for i, composition in enumerate(uses):
        needed = states_of(uses[i + 1 :])
        assert {p.steps for p in remaining.done(composition)} == states_of([composition]) - needed


def test_plans_and_nodes_compare_by_what_they_do() -> None:
    ids = ("a", "a+b", "b[x=1]+a")
    one, same = (Plan.of(map(parse, ids)) for _ in range(2))
    assert one == same and hash(one) == hash(same) and one.root in {same.root}
    assert one != Plan.of(map(parse, ("a", "a+b", "b[x=2]+a")))
    assert one != Plan.of(map(parse, ("a+b", "b[x=1]+a")))  # a is passed through, and not tested
    with pytest.raises(AttributeError):
        one.root.wanted = True  # type: ignore[misc]


def test_the_tree_is_printed_with_what_it_saves_and_costs() -> None:
    plan = Plan.of(map(parse, ("base", "a", "a+b", "b[bits=3]+c", "b[bits=3]+d")))
    assert list(plan.lines(costs())) == [
        "5 compositions: 5 steps to apply instead of 7 (2 saved by shared prefixes)",
        "at least 20 s in one process; snapshots take at least 107 bytes of host memory",
        "no cached run shows the cost of d",
        "(in brackets: intermediate states, not tested)",
        "base",
        "  a  2.0 s",
        "    b  3.0 s",
        "  (b[bits=3])  3.0 s",
        "    c  5.0 s",
        "    d",
    ]
    assert list(Plan.of([parse("d")]).lines(Costs()))[1] == "no cached run shows the cost of d"


def test_costs_are_medians_of_the_very_step_else_of_its_method() -> None:
    found = Costs.of(
        [StepCost("a[x=1]", "a", s, b) for s, b in ((1, 10), (2, 20), (9, 90))] + [StepCost("a", "a", 5, 50)], []
    )
    one, other, unknown = (parse(text).steps[0] for text in ("a[x=1]", "a[x=2]", "b"))
    assert (found.seconds(one), found.bytes(one)) == (2, 20)
    assert (found.seconds(other), found.bytes(other)) == (3.5, 35)
    assert found.seconds(unknown) is None and found.evaluation is None
    assert [duration(s) for s in (3.25, 42, 200, 7500)] == ["3.2 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert [size(b) for b in (17, 2048, 3 * 1024**3)] == ["17 bytes", "2.0 KiB", "3.0 GiB"]


def test_the_suites_hold_what_they_promise() -> None:
    def plan(suite: str) -> Plan:
        return Plan.of(load_recipe(CONF, [f"suite={suite}"]).suite_compositions())

    single, pairs, triples, paper = map(plan, ("single", "pairs", "triples", "paper"))
    assert (len(single.order), single.applications) == (11, 10)
    # 3 editors, 3 unlearners, 4 compressors: 9 + 12 + 12 pairs of categories in both orders.
    assert (len(pairs.order), pairs.applications, pairs.applications_from_scratch) == (77, 76, 142)
    assert (len(triples.order), triples.applications) == (293, 292)
    assert triples.applications_from_scratch == 780 + 10
    assert len(paper.order) == 310
    assert [len([c for c in paper.order if len(c.steps) == k]) for k in (1, 2)] == [28, 282]


def test_only_single_steps_are_permuted() -> None:
    with pytest.raises(RecipeError, match=r"suite.permute: 'memit\+awq' is not one step"):
        load_recipe(CONF, ["suite.permute=[memit+awq]"]).suite_compositions()


def test_planning_imports_no_torch() -> None:
    code = "import sys, pytest_lmcompose.cli, pytest_lmcompose.plan, pytest_lmcompose.cache.run_cache"
    check = f"{code}; assert not {{'torch', 'transformers', 'hydra'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])
