"""Editing blocks whose MLP is routed experts alone: all experts are one layer with one long key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import Edit, apply
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels import memory as kernel
from interventions.edit.kernels.closed_form import alphaedit_update, factorise, free_share, memit_update, null_space
from interventions.edit.kernels.memory import EditedMemory, reading, second_moments
from interventions.edit.kernels.subjects import keys_and_values
from interventions.edit.kernels.target_values import optimise_values
from interventions.experts import find_experts, router_parameters
from interventions.shared_statistics import StatisticsCache
from interventions.statistics import token_batches
from interventions.structure import Memory, first_output
from tests.experts import tiny_experts
from tests.models import SENTENCES

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "jetmoe")
"""Parameters both ways round, with biases, and modules that choose the experts themselves."""
FAST = {"contexts_per_length": 0, "z": ValueSettings(steps=3)}


def _memory(model: Any, layer: int = 0) -> Memory:
    memory = find_anatomy(model).blocks[layer].memory
    assert memory.routed
    assert len(memory.linears) == 8
    return memory


def _keys_and_output(model: Any, memory: Memory, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the keys and outputs of all tokens of a batch."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen["output"] = first_output(output).reshape(-1, memory.out_features)

    tokens = torch.arange(batch["input_ids"].numel())
    with torch.no_grad(), reading(memory, lambda read: seen.update(keys=read(tokens))):
        with memory.module.register_forward_hook(keep):
            model(**batch)
    return seen["keys"], seen["output"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_linear_in_all_experts_with_the_key_that_is_read(family: str, tokenizer: Any) -> None:
    model = tiny_experts(family)
    memory = _memory(model)
    (batch,) = token_batches(tokenizer, SENTENCES, max_tokens=64)
    keys, before = _keys_and_output(model, memory, batch)
    used = keys.unflatten(1, (8, -1)).any(dim=2).sum(dim=1)
    assert bool((used == 2).all())  # as many as a token chooses
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(memory.out_features, keys.shape[1], generator=generator)
    EditedMemory(memory).add_(change)
    again, after = _keys_and_output(model, memory, batch)
    assert torch.equal(again, keys)
    assert torch.allclose(after - before, keys @ change.t(), rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad != q.requires_grad for p, q in zip(model.parameters(), tiny_experts(family).parameters(), strict=True))


@pytest.mark.parametrize("longest", [kernel.LONGEST, 0], ids=["joint", "blocks"])
def test_second_moments_are_those_of_the_keys_however_texts_are_batched(
    longest: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "LONGEST", longest)
    model = tiny_experts("qwen3_moe")
    memory = _memory(model)
    keys = []
    for text in SENTENCES:
        (batch,) = token_batches(tokenizer, [text], max_tokens=64)
        keys.append(_keys_and_output(model, memory, batch)[0])
    every = torch.cat(keys)
    wanted = every.t() @ every / len(every)
    counts = every.unflatten(1, (8, -1)).any(dim=2).sum(dim=0)
    shared = StatisticsCache().of("state")
    for size, cache in ((3, None), (8, shared), (8, shared)):
        batches = token_batches(tokenizer, SENTENCES, max_tokens=64, batch_size=size)
        moments, reached = second_moments(cache, model, batches, [memory])
        found = moments[memory.name]
        assert reached[memory.name] == counts.tolist()
        blocks = torch.stack([wanted[n : n + 16, n : n + 16] for n in range(0, 128, 16)])
        assert torch.allclose(found, wanted if longest else blocks, atol=1e-5)


def test_experts_that_no_text_reaches_have_columns_that_all_count_the_same(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_experts("mixtral")
    memory = _memory(model)
    batches = token_batches(tokenizer, ["a"], max_tokens=1)
    joint, counts = second_moments(None, model, batches, [memory])
    monkeypatch.setattr(kernel, "LONGEST", 0)
    blocks, _ = second_moments(None, model, batches, [memory])
    unseen = [number for number, count in enumerate(counts[memory.name]) if count == 0]
    seen = [number for number, count in enumerate(counts[memory.name]) if count]
    assert len(unseen) == 6
    mean = float(torch.stack([blocks[memory.name][n].diagonal() for n in seen]).mean())
    for number in unseen:
        assert torch.allclose(blocks[memory.name][number], mean * torch.eye(24))
    assert torch.allclose(joint[memory.name].diagonal().reshape(8, 24)[unseen], torch.tensor(mean))


def test_updates_in_blocks_are_those_of_the_block_diagonal_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(5, 60, 6, generator=generator)
    blocks = text.mT @ text / 60
    keys, residuals = (torch.randn(size, 4, generator=generator) for size in (30, 7))
    whole = torch.block_diag(*blocks)
    found = memit_update(keys, residuals, factorise(blocks), 3.0)
    assert torch.allclose(found, memit_update(keys, residuals, factorise(whole), 3.0), atol=1e-8)
    bases = [null_space(moment, 0.9) for moment in (blocks, whole)]
    assert free_share(bases[0]) == free_share(bases[1]) == bases[1].shape[1] / 30
    updates = [alphaedit_update(keys[:, :3], residuals[:, :3], keys[:, 3:], basis, 2.0) for basis in bases]
    assert torch.allclose(*updates, atol=1e-8)


def test_an_expert_with_too_few_tokens_gets_a_ridge_and_leaves_the_others_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 40, 6, generator=generator)
    blocks = text.mT @ text / 40
    blocks[1, 2] = blocks[1, :, 2] = 0
    stored = factorise(blocks)
    assert stored.ridge > 0
    for number in (0, 2):
        assert torch.equal(stored.lower[number], factorise(blocks[number]).lower)


@pytest.mark.parametrize("longest", [kernel.LONGEST, 0], ids=["joint", "blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memit_brings_the_subjects_to_their_values_and_leaves_routers_alone(
    family: str, longest: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "LONGEST", longest)
    model = tiny_experts(family)
    anatomy = find_anatomy(model)
    quick = ValueSettings(steps=6)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS, [""], 0, quick, lambda line: None)
    routers = _routers(model)
    report = apply(
        model,
        tokenizer,
        "memit",
        edits=EDITS,
        calibration=SENTENCES,
        layers=[0],
        contexts_per_length=0,
        covariance_weight=1e-7,
        z=quick,
    )
    assert report.changed == tuple(_memory(model).parameter_names)
    assert all(torch.equal(before, now) for before, now in zip(routers, _routers(model), strict=True))
    _, reached = keys_and_values(model, tokenizer, anatomy, EDITS, [""], 0)
    assert float((reached - wanted.z).norm()) < 0.01 * float(wanted.z.norm())


def _routers(model: Any) -> list[Tensor]:
    return [
        p.detach().clone()
        for block in find_anatomy(model).blocks
        for layer in find_experts(block.name, block.module)
        for p in router_parameters(block.module, layer)
    ]


@pytest.mark.parametrize("method", ["rome", "alphaedit", "ft"])
def test_other_editors_change_the_experts_alone(method: str, tokenizer: Any) -> None:
    model = tiny_experts("mixtral")
    settings: dict[str, Any] = {
        "rome": {"layer": 1, **FAST},
        "alphaedit": {"layers": [1], "nullspace_threshold": 0.5, "nullspace_relative": True, **FAST},
        "ft": {"layers": [1], "steps": 2, "lr": 1e-3},
    }[method]
    report = apply(model, tokenizer, method, edits=EDITS, calibration=SENTENCES, **settings)
    assert report.changed == tuple(_memory(model, 1).parameter_names)


def test_experts_with_few_tokens_are_counted_in_a_warning(tokenizer: Any) -> None:
    model = tiny_experts("mixtral")
    report = apply(model, tokenizer, "memit", edits=EDITS[:1], calibration=SENTENCES, layers=[0], **FAST)
    assert any("of the 8 experts of model.layers.0.mlp.experts got fewer than 96" in line for line in report.warnings)
