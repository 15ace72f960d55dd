"""Loading a model safely, and building states that share prefixes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from interventions import Resources, registry
from pytest_lmcompose.build import StateManager, step_seed
from pytest_lmcompose.composition import Composition, parse
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.load import choose_device, hash_tensors, hash_weights, load_model
from pytest_lmcompose.settings import ModelSettings
from tests.plugin.stubs import METHODS, RoundSettings

CPU = torch.device("cpu")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def manager(tiny_model: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[StateManager]:
    monkeypatch.setattr(registry, "BUILT_IN", METHODS)
    registry.methods.cache_clear()

    def settings(step: Any) -> Any:
        kind = registry.find_method(step.method).settings_type()
        return kind(**{key: int(value) for key, value in step.settings})

    yield StateManager(load_model(ModelSettings(), str(tiny_model), CPU), settings, Resources(), 5, lines.append)
    monkeypatch.undo()
    registry.methods.cache_clear()


def test_weights_are_those_of_the_file_in_float32(tiny_model: Path) -> None:
    loaded = load_model(ModelSettings(), str(tiny_model), CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    half = load_model(ModelSettings(dtype="bfloat16"), str(tiny_model), CPU)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(ModelSettings(), str(folder), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="--lmcompose-device=cuda:0: torch finds no CUDA device"):
        choose_device("cuda:0")
    assert choose_device("auto") == CPU


def test_hash_knows_names_values_shapes_and_dtypes_but_no_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(1.5)
    first = hash_tensors({"a": a, "b": b})
    assert hash_tensors({"b": b, "a": a.t().contiguous().t()}) == first
    others = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a + torch.eye(2, 3) * 1e-6, "b": b},
        {"a": a.to(torch.bfloat16), "b": b},
        {"a": a.view(torch.int32), "b": b},
    ]
    assert len({first, *map(hash_tensors, others)}) == 6


def test_a_prefix_is_built_once_and_each_state_returns_exactly(manager: StateManager, lines: list[str]) -> None:
    ids = ("nudge+round", "nudge", "base", "round+nudge", "nudge+round", "nudge")
    seen: dict[str, str] = {}
    for name in ids:
        state = manager.enter(parse(name))
        assert hash_weights(state.model) == state.state_hash
        assert [str(record.step) for record in state.steps] == ([] if name == "base" else name.split("+"))
        assert seen.setdefault(name, state.state_hash) == state.state_hash
    assert len(set(seen.values())) == 4
    # nudge, its round, round, its nudge: nothing was built twice
    assert [line.split("  ")[:2] for line in lines] == [
        ["nudge+round", "step 1/2 nudge"],
        ["nudge+round", "step 2/2 round"],
        ["round+nudge", "step 1/2 round"],
        ["round+nudge", "step 2/2 nudge"],
    ]


def test_a_state_is_the_same_whoever_asks_first(tiny_model: Path, manager: StateManager) -> None:
    alone = manager.enter(parse("nudge")).state_hash
    other = StateManager(
        load_model(ModelSettings(), str(tiny_model), CPU),
        lambda step: registry.find_method(step.method).settings_type()(),
        Resources(),
        5,
        lambda line: None,
    )
    other.enter(parse("nudge+round"))
    assert other.enter(parse("nudge")).state_hash == alone


def test_seeds_differ_by_run_and_prefix() -> None:
    prefixes = [parse(text) for text in ("nudge", "round+nudge", "nudge+nudge", "nudge[scale=2]")]
    seeds = [step_seed(run, prefix) for run in (0, 1) for prefix in prefixes]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_failing_step_is_tried_once_and_leaves_its_prefix(manager: StateManager, lines: list[str]) -> None:
    for name in ("nudge+refuse", "nudge+refuse", "nudge+refuse+round"):
        with pytest.raises(BuildError, match="step 2, refuse: layer 7 is missing"):
            manager.enter(parse(name))
        assert [str(r.step) for r in manager.steps_built(parse(name))] == ["nudge"]
    assert sum("failed" in line for line in lines) == 1


def test_what_a_user_does_to_the_model_is_undone(manager: StateManager) -> None:
    state = manager.enter(parse("nudge"))
    state.model.train()
    state.model.config.use_cache = not state.model.config.use_cache
    for parameter in state.model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        state.model.model.norm.weight.fill_(0)
    again = manager.enter(parse("nudge"))
    assert hash_weights(again.model) == state.state_hash
    assert not again.model.training and again.model.config.use_cache
    assert all(parameter.requires_grad for parameter in again.model.parameters())


def test_the_pristine_model_is_another_one(manager: StateManager) -> None:
    state = manager.enter(parse("nudge+round"))
    pristine = manager.pristine()
    assert pristine.model is not state.model
    assert hash_weights(pristine.model) == manager.base_hash
    assert pristine.composition == Composition()
    # The working model still holds the state that its holder was promised.
    assert hash_weights(state.model) == state.state_hash


def test_records_tell_what_a_step_did(manager: StateManager) -> None:
    (record,) = manager.enter(parse("round[digits=1]")).steps
    assert record.report.settings == {"digits": 1} != {"digits": RoundSettings().digits}
    assert record.report.warnings == ("rounded to nearest",)
    assert len(record.report.changed) == 14
