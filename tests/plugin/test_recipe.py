"""Recipes: overrides in Hydra's grammar, checked against the code's own types."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.compress.awq import AwqSettings
from interventions.edit.bases import ValueSettings
from pytest_lmcompose.locate import model_location, model_overrides, world_folder
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.recipe import Recipe, RecipeError, load_recipe, presets, quoted
from pytest_lmcompose.run import CONF
from pytest_lmcompose.settings import ModelSettings


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(CONF)


def test_main_suite(recipe: Recipe) -> None:
    assert [c.id for c in recipe.suite_compositions()] == ["base", "memit", "awq", "memit+awq", "awq+memit"]


@pytest.mark.parametrize("group", ["model", "world", "evaluate", "suite"])
def test_every_preset_composes(group: str) -> None:
    for name in presets(CONF, group):
        composed = load_recipe(CONF, [f"{group}={name}"])
        assert composed.suite_compositions()


def test_sections_are_frozen_and_typed(recipe: Recipe) -> None:
    assert isinstance(recipe.model, ModelSettings)
    with pytest.raises(AttributeError):
        recipe.model.dtype = "float16"  # type: ignore[misc]


def test_brackets_override_one_step_only() -> None:
    recipe = load_recipe(CONF, ["model=any", "awq.bits=5", "awq.group_size=32"])
    first, second = recipe.read("awq[bits=3]+awq").steps
    assert recipe.settings(first) == AwqSettings(bits=3, group_size=32)
    assert recipe.settings(second) == AwqSettings(bits=5, group_size=32)


def test_settings_inside_settings() -> None:
    recipe = load_recipe(CONF, ["memit.z.lr=0.25"])
    (step,) = recipe.read("memit[z.steps=7]").steps
    assert recipe.settings(step).z == ValueSettings(steps=7, lr=0.25)


def test_an_override_wins_over_the_preset_of_the_model() -> None:
    assert load_recipe(CONF, ["model=any"]).config["awq"]["samples"] == 128
    assert load_recipe(CONF, ["model=tinyworld"]).config["awq"]["samples"] == 32
    assert load_recipe(CONF, ["model=tinyworld", "awq.samples=24"]).config["awq"]["samples"] == 24


def test_mappings_take_new_keys() -> None:
    world = load_recipe(CONF, ["world.forget.smithing=forget.jsonl", "world.pools.odd=[a, b]"]).world
    assert world.forget["smithing"] == "forget.jsonl"
    assert world.pools["odd"] == ["a", "b"]


def test_a_mapping_or_list_replaces_that_of_a_preset() -> None:
    world = load_recipe(
        CONF, ["world.forget={astronomy: a.jsonl}", "world.pools={x: [a]}", "world.hazardous=[x]"]
    ).world
    assert (world.forget, world.pools, world.hazardous) == ({"astronomy": "a.jsonl"}, {"x": ["a"]}, ["x"])
    assert load_recipe(CONF, ["world.forget={a: a.txt}", "world.forget.b=b.txt"]).world.forget == {
        "a": "a.txt",
        "b": "b.txt",
    }
    assert load_recipe(CONF, ["world.forget={}"]).world.forget == {}
    source = ["world.retain={path: a, split: x, limit: 3}", "world.retain={path: b}", "world.retain.split=test"]
    assert load_recipe(CONF, source).world.retain == {"path": "b", "split": "test"}
    with pytest.raises(RecipeError, match=r"world\.forget\.a=.*with the key path"):
        load_recipe(CONF, ["world.forget={a: {split: x}}"])


def test_a_mapping_for_a_section_keeps_its_other_keys() -> None:
    changed = load_recipe(CONF, ["awq.samples=24", "awq={bits: 3}"]).config["awq"]
    assert (changed["samples"], changed["bits"]) == (24, 3)


def test_permuted_suites_add_to_the_named_ones() -> None:
    recipe = load_recipe(CONF, ["suite.compositions=[base]", "suite.permute=[memit,awq]"])
    assert [c.id for c in recipe.suite_compositions()] == ["base", "memit", "awq", "memit+awq", "awq+memit"]


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("awq.bit=3", ["unknown key 'bit' of awq", "Did you mean bits?", "group_size"]),
        ("awk.bits=3", ["unknown section 'awk'", "Did you mean awq?"]),
        ("mdoel=tinyworld", ["unknown section 'mdoel'", "model"]),
        ("model=tinywrld", ["no preset 'tinywrld'", "Did you mean tinyworld?"]),
        ("suite=[main]x", ["not an override"]),
        ("compress=[gtpq]", ["no preset 'gtpq'", "gptq"]),
        ("awq.bits=three", ["awq.bits=three", "a whole number from 2 to 8"]),
        ("awq.bits=null", ["awq.bits=null", "a whole number from 2 to 8"]),
        ("memit.layers=[a]", ["memit.layers=['a']", "each a whole number from 0 up"]),
        ("memit.z.steps=2.5", ["memit.z.steps", "2.5"]),
        ("memit.z.stps=2", ["unknown key 'stps' of memit.z", "Did you mean steps"]),
        ("memit.layers.x=2", ["memit.layers has no keys of its own"]),
        ("+awq.extra=1", ["cannot be added"]),
        ("~awq.bits", ["cannot be added or removed"]),
        ("awq.bits=3,4", ["several values"]),
        ("awq", ["key=value"]),
        ("model.dtype=float33", ["expected one of", "float32"]),
        ("world.edits_schema=zsr", ["expected one of zsre"]),
        ("world.hazardous=[evil]", ["world.hazardous=evil", "Known: hazardous, harmless"]),
    ],
)
def test_refused_overrides(override: str, messages: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(CONF, [override])
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("memti+awq", ["unknown intervention 'memti'", "Did you mean memit"]),
        ("awq[bit=3]", ["unknown key 'bit'", "Did you mean bits?"]),
        ("awq[bits=three]", ["awq.bits=three", "a whole number from 2 to 8"]),
        ("awq[bits=3", ["never closed"]),
    ],
)
def test_refused_compositions(recipe: Recipe, text: str, messages: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        recipe.read(text)
    assert all(message in str(error.value) for message in messages)


@settings(max_examples=15)
@given(st.text("ab '\\\"[],=", min_size=1, max_size=8))
def test_quoting_carries_any_path_through_hydras_grammar(path: str) -> None:
    assert load_recipe(CONF, ["model=any", f"model.path={quoted(path)}"]).model.path == path


def test_model_names_in_order_preset_folder_path_hub(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "tinyworld").mkdir()  # the preset wins over a folder of its name
    assert model_overrides("tinyworld", CONF, tmp_path) == ("model='tinyworld'",)
    folder = load_recipe(CONF, model_overrides(str(tiny_model), CONF, tmp_path)).model.path
    assert model_location(folder, tmp_path) == str(tiny_model)
    hub = load_recipe(CONF, model_overrides("EleutherAI/pythia-70m", CONF, tmp_path)).model.path
    assert model_location(hub, tmp_path) == "EleutherAI/pythia-70m"
    assert model_location("gpt2", tmp_path) == "gpt2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such model folder"),
        ("/nowhere/at/all", "no such model folder"),
        ("~/nowhere-at-all", "no such model folder"),
        ("here/absent", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("here", "has no config.json"),
        ("tinyword", "Did you mean tinyworld?"),
    ],
)
def test_model_names_that_are_nothing(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        model_overrides(name, CONF, tmp_path)


def test_missing_model_and_world_of_a_recipe(tmp_path: Path) -> None:
    for path, message in (("", "model.path is empty"), ("tinyworld/absent", "no such model folder")):
        with pytest.raises(RecipeError, match=message):
            model_location(path, tmp_path)
    with pytest.raises(RecipeError, match=r"world\.folder='absent'"):
        world_folder("absent", tmp_path)
    assert world_folder("conf", tmp_path) == SUITE_FOLDER / "conf"
