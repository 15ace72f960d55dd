"""States in which the head has weights of its own, of a model whose head shares those of the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interventions import Resources, registry
from interventions.tying import tied_head
from pytest_lmcompose.build.load import hash_weights, load_model
from pytest_lmcompose.build.states import StateManager
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.run_cache import RunCache
from pytest_lmcompose.checkpoints.write import write_checkpoint
from pytest_lmcompose.composition import parse
from pytest_lmcompose.settings import ModelSettings
from tests.models import CONFIGS, tiny_model

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True}),
    "gemma": CONFIGS["gemma"],
    "gpt2": CONFIGS["gpt2"],
    "opt": CONFIGS["opt"],
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 23).unsqueeze(0), use_cache=False).logits
    return found


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Path:
    tiny_model(FAMILIES[request.param]()).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def manager(folder: Path, run_cache: RunCache | None = None) -> StateManager:
    def settings(step: Any) -> Any:
        kind = registry.find_method(step.method).settings_type()
        return kind(**{key: int(value) for key, value in step.settings})

    loaded = load_model(ModelSettings(), str(folder), torch.device("cpu"))
    return StateManager(loaded, settings, Resources(), 5, lambda line: None, run_cache)


def test_states_come_and_go(folder: Path) -> None:
    states = manager(folder)
    model = states.loaded.model
    base, head = logits(model), tied_head(model)
    assert head is not None
    rounded = states.enter(parse("rtn[bits=3]"))
    as_rounded = logits(rounded.model)
    for _ in range(2):
        rotated = states.enter(parse("rotate"))
        assert tied_head(rotated.model) is None and not rotated.model.config.tie_word_embeddings
        assert head in rotated.steps[0].report.changed
        torch.testing.assert_close(logits(rotated.model), base, rtol=0, atol=1e-4)
        assert rotated.state_hash == hash_weights(rotated.model)
        both = states.enter(parse("rotate+rtn[bits=3]"))
        assert both.state_hash == hash_weights(both.model) != rotated.state_hash
        assert not torch.allclose(logits(both.model), as_rounded, atol=1e-3)
        with states.visit(parse("rtn[bits=3]")) as state:
            assert torch.equal(logits(state.model), as_rounded)
            assert tied_head(state.model) == head and state.model.config.tie_word_embeddings
        assert tied_head(both.model) is None and both.state_hash == hash_weights(both.model)


def test_the_cache_holds_them(folder: Path, tmp_path: Path) -> None:
    store = Cache(tmp_path / "cache", limit=2**30, warn=lambda line: None)
    first = manager(folder, RunCache(store, "tiny"))
    built = first.enter(parse("rotate+rtn[bits=3]"))
    wanted = logits(built.model)
    second = manager(folder, RunCache(store, "tiny"))
    read = second.enter(parse("rotate+rtn[bits=3]"))
    assert second._run_cache is not None and second._run_cache.states_read
    assert read.state_hash == built.state_hash and torch.equal(logits(read.model), wanted)
    assert tied_head(read.model) is None
    assert tied_head(second.pristine().model) is not None


def test_a_folder_loads_to_the_same_model(folder: Path, tmp_path: Path) -> None:
    state = manager(folder).enter(parse("rotate"))
    (tmp_path / "out").mkdir()
    digest = write_checkpoint(tmp_path / "out", state.model, state.tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert digest == state.state_hash == hash_weights(again)
    assert torch.equal(logits(again), logits(state.model))
    assert tied_head(again) is None
