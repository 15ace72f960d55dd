"""model.device_map and model.memory_budget: where a model is loaded to, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interventions import Resources
from interventions.structure import placement
from pytest_lmcompose.build import load
from pytest_lmcompose.build.identity import base_address
from pytest_lmcompose.build.load import hash_weights, load_model
from pytest_lmcompose.build.states import StateManager
from pytest_lmcompose.composition import parse
from pytest_lmcompose.recipe import RecipeError, load_recipe
from pytest_lmcompose.settings import ModelSettings
from tests.plugin.conftest import ROOT

CPU = torch.device("cpu")
CONF = ROOT / "compositions" / "conf"


def test_a_model_on_the_host_knows_its_device_and_budget(tiny_model: Path) -> None:
    plain = load_model(ModelSettings(), str(tiny_model), CPU)
    host = load_model(ModelSettings(device_map="host", memory_budget=0.5), str(tiny_model), CPU)
    assert placement(host.model).streamed
    assert placement(host.model).budget == 1 << 29
    assert hash_weights(host.model) == hash_weights(plain.model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(host.model(ids).logits, plain.model(ids).logits)


def test_a_budget_alone_is_for_the_block_at_work(tiny_model: Path) -> None:
    where = placement(load_model(ModelSettings(memory_budget=1), str(tiny_model), CPU).model)
    assert (where.streamed, where.budget) == (False, 1 << 30)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_accelerate_spreads_a_model(device_map: Any, tiny_model: Path) -> None:
    plain = load_model(ModelSettings(), str(tiny_model), CPU)
    spread = load_model(ModelSettings(device_map=device_map, memory_budget=1), str(tiny_model), CPU)
    assert hash_weights(spread.model) == hash_weights(plain.model)
    assert not placement(spread.model).streamed


def test_weights_left_on_disk_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(ModelSettings(), str(tiny_model), CPU).model.to("meta")
    with pytest.raises(RecipeError, match=r"model.device_map=auto: \d+ weights do not fit .*model.device_map=host"):
        load._check_held(model, ModelSettings(device_map="auto"))


def test_results_of_another_budget_are_others(tiny_model: Path) -> None:
    loaded = [
        load_model(settings, str(tiny_model), CPU)
        for settings in (ModelSettings(), ModelSettings(memory_budget=1), ModelSettings(memory_budget=2))
    ]
    assert len({base_address(one, "weights") for one in loaded}) == 3


def test_states_of_a_model_on_the_host_are_built_and_shared(tiny_model: Path) -> None:
    """Siblings get each other's statistics, and give what they give alone."""
    settings = load_recipe(CONF, ["world=tinyworld"]).settings
    texts = Resources(calibration=tuple(f"Text {n} of words that were seen before." for n in range(40)))

    def hashes(model: ModelSettings, *ids: str) -> list[str]:
        loaded = load_model(model, str(tiny_model), CPU)
        manager = StateManager(loaded, settings, texts, 0, lambda line: None)
        return [manager.enter(parse(text)).state_hash for text in ids]

    wanted = ["sparsegpt", "wanda"]
    apart = [hashes(ModelSettings(), text)[0] for text in wanted]
    assert hashes(replace(ModelSettings(), device_map="host"), *wanted) == apart


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.device_map=hots", r"model.device_map=hots: expected one of .*host.*Did you mean"),
        ("model.device_map=3", r"model.device_map=3: expected one of auto, .*host, a mapping, or null"),
        ("model.memory_budget=0", r"model.memory_budget=0.*: expected a number above 0, or null"),
        ("model.memory_budget=-2", r"model.memory_budget=-2.*: expected a number above 0"),
    ],
)
def test_refused_placements(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(CONF, [override])


def test_a_mapping_is_a_value() -> None:
    recipe = load_recipe(CONF, ["model.device_map={model.embed_tokens: 0, lm_head: cpu}"])
    assert recipe.model.device_map == {"model.embed_tokens": 0, "lm_head": "cpu"}
