"""Steps that read the states of other compositions: planned, built before, cached, and refused where they cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interventions import Resources, registry
from pytest_lmcompose.build.load import hash_weights, load_model
from pytest_lmcompose.build.states import StateManager, step_seed
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.run_cache import RunCache
from pytest_lmcompose.composition import parse
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.errors import BuildError, RecipeError
from pytest_lmcompose.plan import Plan, Remaining, needed
from pytest_lmcompose.recipe import Recipe, load_recipe
from pytest_lmcompose.run import CONF
from pytest_lmcompose.settings import ModelSettings
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.stubs import METHODS
from tests.plugin.test_run import by_id, read_report

MERGE = 'nudge[layers=[1]]+merge[method=linear,weight=[1,3],with="nudge+round"]'


@pytest.fixture(scope="module")
def recipe() -> Iterator[Recipe]:
    with pytest.MonkeyPatch.context() as patch:
        for method in METHODS:
            patch.setitem(registry._table, method.name, method)
        yield load_recipe(CONF)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def manage(recipe: Recipe, tiny_model: Path, lines: list[str]) -> Iterator[Callable[..., StateManager]]:
    loaded = load_model(ModelSettings(), str(tiny_model), torch.device("cpu"))

    def manager(cache: RunCache | None = None, recipe: Recipe = recipe, seed: int = 5) -> StateManager:
        mine = replace(loaded, model=copy.deepcopy(loaded.model))
        return StateManager(
            mine, recipe.settings, Resources(), seed, lines.append, cache, others=recipe.others
        )  # fmt: skip

    yield manager


def values(manager: StateManager, name: str) -> dict[str, torch.Tensor]:
    with manager.visit(parse(name)) as state:
        return {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}


def built(lines: list[str]) -> list[str]:
    found = [line.split("  ")[:2] for line in lines]
    lines.clear()
    return [f"{composition}: {what}" for composition, what in found]


def test_the_states_are_built_before_the_step_that_reads_them(manage: Callable[..., StateManager], lines: Any) -> None:
    manager = manage()
    merged = values(manager, MERGE)
    assert built(lines) == [
        f"{MERGE}: step 1/2 nudge[layers=[1]]",
        "nudge+round: step 1/2 nudge",
        "nudge+round: step 2/2 round",
        f"{MERGE}: step 2/2 {parse(MERGE).steps[1]}",
    ]
    one, other = values(manager, "nudge[layers=[1]]"), values(manager, "nudge+round")
    assert lines == []
    for name, value in merged.items():
        torch.testing.assert_close(value, (one[name] + 3 * other[name]) / 4)
    # With task vectors, from the base model of the run.
    base, added = (
        values(manager, "base"),
        values(manager, "nudge+merge[method=task_arithmetic,with='nudge[layers=[1]]']"),
    )
    for name, value in added.items():
        torch.testing.assert_close(value, values(manager, "nudge")[name] + one[name] - base[name])


def test_states_are_those_of_the_same_repeat(manage: Callable[..., StateManager]) -> None:
    manager = manage()
    second = manager.repeat(Resources(), 6, lambda line: None)
    name = "round+merge[method=linear,with=nudge,weight=[0,1]]"
    for one in (manager, second):
        with one.visit(parse("nudge")) as state:
            wanted = state.state_hash
        with one.visit(parse(name)) as state:
            assert state.state_hash == wanted
    assert manager.address(parse(name)) != second.address(parse(name))


def test_addresses_depend_on_the_states_that_are_read(manage: Callable[..., StateManager], recipe: Recipe) -> None:
    def address(name: str, recipe: Recipe = recipe) -> str:
        return manage(recipe=recipe).address(parse(name))

    first = address("round+merge[with=nudge]")
    assert first == address("round+merge[with=nudge]") == address("round+merge[with=nudge]")
    assert first != address("round+merge[with='nudge[scale=0.02]']")
    assert first != address("round+merge[with=nudge,base=idle]")
    assert first != address("round+merge[with=nudge]", load_recipe(CONF, ["nudge.scale=0.02"]))
    assert address("round+nudge") == address("round+nudge", load_recipe(CONF, ["merge.with=nudge"]))


def test_cached_states_are_read_and_not_built(
    manage: Callable[..., StateManager], lines: list[str], tmp_path: Path
) -> None:
    def cache() -> RunCache:
        return RunCache(Cache(tmp_path / "store", 10**9, lines.append), "tiny")

    manager = manage(cache())
    with manager.visit(parse(MERGE)) as state:
        wanted = state.state_hash
    lines.clear()
    again = manage(cache())
    with again.visit(parse(MERGE)) as state:
        assert state.state_hash == wanted == hash_weights(state.model)
    assert [line for line in lines if "step" in line] == []
    with again.visit(parse(f"{MERGE}+round".replace("3],", "4],"))):
        assert next(line.split("  ")[1] for line in lines if "step" in line).startswith("step 2/3 merge")


def test_a_released_state_is_built_again(manage: Callable[..., StateManager], lines: list[str]) -> None:
    manager = manage()
    before = values(manager, MERGE)
    manager.release(map(parse, (MERGE, "nudge", "nudge+round")))
    lines.clear()
    after = values(manager, MERGE)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(built(lines)) == 3


def test_a_state_that_fails_fails_the_step_that_reads_it_once(
    manage: Callable[..., StateManager], lines: list[str]
) -> None:
    manager = manage()
    for _ in range(2):
        with pytest.raises(
            BuildError, match=r"^step 2, merge\[with=refuse\]: refuse: step 1, refuse: layer 7 is missing"
        ):
            values(manager, "nudge+merge[with=refuse]")
    assert len([line for line in lines if "failed" in line]) == 1
    assert hash_weights(manager.enter(parse("base")).model) == manager.base_hash


def test_known_grids_are_not_claimed_after_a_merge(manage: Callable[..., StateManager]) -> None:
    """A merged weight has left the grid that a checkpoint or a quantiser gave it."""
    from evaluators.grids import find_grid

    manager = manage()
    name = "model.layers.0.mlp.up_proj.weight"
    quantised = values(manager, "rtn[bits=3,group_size=-1]")
    assert find_grid(quantised[name]) is not None
    merged = values(manager, "rtn[bits=3,group_size=-1]+merge[method=linear,with='nudge[layers=[0,1]]']")
    assert find_grid(merged[name]) is None


def test_a_plan_has_the_states_that_are_read_first(recipe: Recipe) -> None:
    wanted = [recipe.read("nudge+merge[with='round+inflate',base=round]"), recipe.read("round")]
    plan = Plan.of(wanted, recipe.reads)
    assert [state.id for state in plan.states] == ["round", "round+inflate", "nudge", wanted[0].id]
    assert plan.order == (wanted[1], wanted[0])
    assert (plan.applications, plan.applications_from_scratch) == (4, 5)
    assert [line.strip() for line in plan.lines(Costs())][-5:] == [
        "(base)",
        "round",
        "(round+inflate)".replace("round+", ""),
        "(nudge)",
        str(wanted[0].steps[-1]),
    ]
    nested = recipe.read("nudge+merge[with='round+merge[with=inflate]']")
    assert [state.id for state in needed(nested, recipe.reads)][:2] == ["inflate", "round"]


def test_states_are_needed_until_the_last_step_that_reads_them(recipe: Recipe) -> None:
    uses = [recipe.read(name) for name in ("nudge+merge[with=round]", "inflate+merge[with=round]", "nudge")]
    remaining = Remaining(uses, recipe.reads)
    assert remaining.done(uses[0]) == (uses[0],)
    assert set(remaining.done(uses[1])) == {parse("round"), parse("inflate"), uses[1]}
    assert remaining.done(uses[2]) == (parse("nudge"),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nudge+merge[with=nudge]", "with=nudge: is the model that the step starts from"),
        (
            "nudge+merge[with='nudge[ layers = [0] ]+round',base='nudge[layers=[0]]+round']",
            "is the base of the task vectors",
        ),
        ("merge[method=linear,with=base]", "with=base: is the model that the step starts from"),
        ("nudge+merge[with=base]", "with=base: is the base of the task vectors"),
        ("nudge+merge[with=[round,'round ']]", "expected every model once"),
        ("nudge+merge[with=[round+idle,'round + idle']]", "is named twice"),
        ("nudge+merge[with='round+nothing']", r"merge\[with='round\+nothing'\]: unknown intervention 'nothing'"),
        ("nudge+merge[with='round[digits=x]']", "round.digits"),
        ("nudge+merge[with='round+']", "expected the name of a method"),
        ("nudge+merge[with='round+merge[with=round]']", "with=round: is the model that the step starts from"),
        ("nudge+merge[with=round,weight=[1,2,3]]", r"expected one number, or a list of 2, one for each model"),
        ("nudge+merge[with=round,density=[0.5]]", "expected one number, or a list of 2"),
        ("merge[with=round,method=model_stock]", "model_stock needs at least two models beside the base"),
        ("merge[with=round,lamda=2]", "unknown key 'lamda' of merge. Did you mean lambda"),
        ("merge[with=round,method=sce,lambda=2]", "merge.lambda: method=sce does not use it"),
    ],
)
def test_what_is_refused_before_any_work(recipe: Recipe, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.read(name)
    assert "\n" not in str(caught.value) or "character" in str(caught.value)


def test_a_list_of_weights_with_and_without_the_base(recipe: Recipe) -> None:
    for name in ("merge[with=[nudge,round],weight=[1,2]]", "merge[with=[nudge,round],weight=[0,1,2]]"):
        recipe.read(name)
    with pytest.raises(RecipeError, match="a list of 3, one for each model"):
        recipe.read("idle+merge[with=[nudge,round],weight=[1,2]]")


def test_a_default_that_reads_itself(recipe: Recipe) -> None:
    circular = load_recipe(CONF, ["merge.with='nudge+merge'"])
    with pytest.raises(RecipeError, match=r"merge: merge reads a composition that has this step itself: nudge\+merge"):
        circular.read("round+merge")
    assert load_recipe(CONF, ["merge.with=nudge", "merge.lambda=0.5"]).settings(parse("merge").steps[0]).lambda_ == 0.5


def test_folders_are_checked_before_any_work(project: Project, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "merge: with is empty: name a folder" in refused(compose=("nudge+merge",))
    assert "with=./nowhere: no such folder" in refused(compose=("nudge+merge[with=./nowhere]",))
    assert "and no composition. Did you mean nudge" in refused(compose=("nudge+merge[with=nudgge+round]",))
    assert "base=./nowhere: no such folder" in refused(compose=("nudge+merge[with=round,base=./nowhere]",))
    assert "load[path=./gone]: path=./gone: no such" in refused(compose=("nudge+merge[with='load[path=./gone]']",))
    from tests.models import tiny_model

    tiny_model("gpt2").save_pretrained(project.path / "other")
    assert "is a GPT2LMHeadModel" in refused(compose=("nudge+merge[with=./other]",))
    assert "is a GPT2LMHeadModel" in refused(compose=("nudge+merge[with=round,base=./other]",))


@pytest.mark.parametrize("workers", [(), pytest.param(("-n2",), marks=pytest.mark.slow)])
def test_a_run_that_merges(project: Project, workers: tuple[str, ...]) -> None:
    project.arguments[project.arguments.index(NO_CACHE)] = "--lmcompose-cache-dir=store"
    ids = (MERGE, f"{MERGE}+round", "merge[with=[nudge,round],density=0.5]")
    result = project.run("--lmcompose-json=report.json", *workers, compose=ids)
    assert result.ret == pytest.ExitCode.OK, result.stdout.str()
    report = read_report(project.path / "report.json")
    records = by_id(report)
    assert {name: records[name]["status"] for name in map(lambda id: parse(id).id, ids)} == dict.fromkeys(
        map(lambda id: parse(id).id, ids), "measured"
    )
    step = records[parse(MERGE).id]["steps"][1]
    assert step["category"] == "merge" and step["seed"] == step_seed(0, parse(MERGE))
    assert step["settings"]["with"] == "nudge+round" and list(step["details"]["contents"]) == ["nudge+round"]
    assert report["plan"]["steps"][str(parse(MERGE).steps[1])]["with"] == "nudge+round"
    assert "nudge" in report["plan"]["steps"]
