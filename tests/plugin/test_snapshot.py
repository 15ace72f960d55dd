"""Snapshots of the working model: what they hold and what they share."""

from __future__ import annotations

import pytest
import torch

from interventions.rounding import Rounding
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.build.snapshot import WorkingModel
from tests.models import tiny_model

NAMES = tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))


@torch.no_grad()
def change(working: WorkingModel, *names: str) -> None:
    parameters = dict(working.model.named_parameters())
    for name in names:
        parameters[name].add_(torch.rand_like(parameters[name]))


def test_a_snapshot_holds_what_changed_and_shares_the_rest() -> None:
    working = WorkingModel(tiny_model())
    assert working.base.state_hash == hash_weights(working.model)
    change(working, NAMES[0])
    first = working.take(working.base, NAMES[:1])
    change(working, NAMES[1])
    second = working.take(first, NAMES[1:])
    assert set(first.changed) == {NAMES[0]} and set(second.changed) == set(NAMES)
    assert second.changed[NAMES[0]] is first.changed[NAMES[0]]
    assert second.state_hash == hash_weights(working.model)
    for snapshot in (first, working.base, second, first):
        working.restore(snapshot)
        assert hash_weights(working.model) == snapshot.state_hash


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_tied_weights_count_under_every_name(family: str) -> None:
    model = tiny_model(family)
    working = WorkingModel(model)
    embedding = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    change(working, name)
    assert working.take(working.base, [name]).state_hash == hash_weights(model)


def test_only_tensors_that_differ_are_written_unless_the_model_was_given_away() -> None:
    working = WorkingModel(tiny_model())
    change(working, NAMES[0])
    state = working.take(working.base, NAMES[:1])
    norm = working.model.model.norm.weight
    versions = {n: p._version for n, p in working.model.named_parameters()}
    working.restore(working.base)
    written = [n for n, p in working.model.named_parameters() if p._version != versions[n]]
    assert written == [NAMES[0]]
    norm.data.fill_(7)
    working.distrust()
    working.restore(state)
    assert hash_weights(working.model) == state.state_hash


def test_parameters_that_take_the_place_of_others_are_the_ones_restored() -> None:
    working = WorkingModel(tiny_model())
    projection = working.model.model.layers[0].mlp.down_proj

    def replace() -> None:
        working.distrust()
        projection.weight = torch.nn.Parameter(torch.rand_like(projection.weight))

    replace()
    state = working.take(working.base, NAMES[:1])
    for snapshot in (working.base, state):
        working.restore(snapshot)
        assert hash_weights(working.model) == snapshot.state_hash
    replace()
    working.restore(state)
    assert hash_weights(working.model) == state.state_hash


def test_a_restored_model_is_in_eval_mode_whoever_changed_that() -> None:
    working = WorkingModel(tiny_model())
    working.restore(working.base)
    working.model.train()
    working.restore(working.base)
    assert not any(module.training for module in working.model.modules())
    working.distrust()
    working.model.model.layers[0].mlp.train()
    working.restore(working.base)
    assert not any(module.training for module in working.model.modules())


def test_a_state_read_back_is_the_same_and_shares_what_is_there() -> None:
    working = WorkingModel(tiny_model())
    change(working, NAMES[0])
    first = working.take(working.base, NAMES[:1])
    change(working, NAMES[1])
    second = working.take(first, NAMES[1:])
    adopted = working.adopt(first, {name: tensor.clone() for name, tensor in second.changed.items()}, Rounding())
    assert adopted.state_hash == second.state_hash
    assert adopted.changed[NAMES[0]] is first.changed[NAMES[0]]
    working.restore(working.base)
    working.restore(adopted)
    assert hash_weights(working.model) == second.state_hash
    with pytest.raises(KeyError):
        working.adopt(first, {"unknown": torch.zeros(1)}, Rounding())
    with pytest.raises(ValueError, match=r"is \(1,\)"):
        working.adopt(first, {NAMES[0]: torch.zeros(1)}, Rounding())
