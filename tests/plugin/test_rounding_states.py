"""States of models that round inputs of layers while they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from interventions import Resources, registry
from interventions.rounding import rounding_of
from pytest_lmcompose.build.load import hash_weights, load_model
from pytest_lmcompose.build.states import StateManager
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.run_cache import RunCache
from pytest_lmcompose.composition import parse
from pytest_lmcompose.settings import ModelSettings
from tests.models import SENTENCES, tiny_model

BOTH = "rtn[scheme=NVFP4,kv_cache=fp8]+magnitude"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 23).unsqueeze(0), use_cache=False).logits
    return found


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def manager(folder: Path, run_cache: RunCache | None = None) -> StateManager:
    def settings(step: Any) -> Any:
        return registry.find_method(step.method).settings_type()(**{k: yaml.safe_load(v) for k, v in step.settings})

    loaded = load_model(ModelSettings(), str(folder), torch.device("cpu"))
    resources = Resources(calibration=[" ".join(SENTENCES)] * 4)
    return StateManager(loaded, settings, resources, 5, lambda line: None, run_cache)


def test_states_come_and_go(folder: Path) -> None:
    states = manager(folder)
    base = logits(states.loaded.model)
    first = states.enter(parse("rtn[scheme=NVFP4,kv_cache=fp8]"))
    rounded, rounding = logits(first.model), rounding_of(first.model)
    assert rounding.inputs and rounding.caches
    assert first.state_hash == hash_weights(first.model)
    for _ in range(2):
        both = states.enter(parse(BOTH))
        assert rounding_of(both.model) == rounding
        assert both.state_hash == hash_weights(both.model)
        with states.visit(parse("magnitude")) as state:
            assert not rounding_of(state.model)
        assert rounding_of(both.model) == rounding
    with states.visit(parse("rtn[scheme=NVFP4,kv_cache=fp8]")) as state:
        assert torch.equal(logits(state.model), rounded)
    assert torch.equal(logits(states.enter(parse("base")).model), base)
    assert not rounding_of(states.pristine().model)


def test_what_is_rounded_is_part_of_the_states_hash(folder: Path) -> None:
    states = manager(folder)
    rounded = states.enter(parse("rtn[scheme=W8A8]"))
    alone = states.enter(parse("rtn[bits=8,group_size=-1,symmetric=true,kv_cache=int8]"))
    assert rounded.state_hash != alone.state_hash


def test_the_cache_holds_it(folder: Path, tmp_path: Path) -> None:
    store = Cache(tmp_path / "cache", limit=2**30, warn=lambda line: None)
    built = manager(folder, RunCache(store, "tiny")).enter(parse(BOTH))
    wanted, rounding = logits(built.model), rounding_of(built.model)
    second = manager(folder, RunCache(store, "tiny"))
    read = second.enter(parse(BOTH))
    assert second._run_cache is not None and second._run_cache.states_read
    assert read.state_hash == built.state_hash
    assert rounding_of(read.model) == rounding
    assert torch.equal(logits(read.model), wanted)
