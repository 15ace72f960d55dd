"""Editing blocks whose MLP is routed experts alone: all experts are one layer with one long key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
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
from tests.tokenizers import SPECIAL, word_tokenizer

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
    handle = memory.module.register_forward_hook(keep)
    with torch.no_grad(), reading(memory, lambda read: seen.update(keys=read(tokens))):
        model(**batch)
    handle.remove()
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
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


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


@pytest.mark.parametrize(("family", "longest"), [*((family, kernel.LONGEST) for family in FAMILIES), ("mixtral", 0)])
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


class ListedExperts(nn.Module):
    """Experts as modules of their own beside a router, as code that comes with models has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width)) for _ in range(8)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).softmax(dim=1).topk(2, dim=1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return out.view(hidden.shape)


def test_memit_edits_experts_that_are_modules(tokenizer: Any) -> None:
    model = tiny_experts("mixtral")
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = ListedExperts(32)
    memory = _memory(model)
    assert [linear.name for linear in memory.linears] == [f"model.layers.0.mlp.experts.{n}.2" for n in range(8)]
    settings = {"contexts_per_length": 0, "covariance_weight": 1e-7, "z": ValueSettings(steps=6)}
    before = keys_and_values(model, tokenizer, find_anatomy(model), EDITS, [""], 0).keys
    report = apply(model, tokenizer, "memit", edits=EDITS, calibration=SENTENCES, layers=[0], **settings)
    used = before.unflatten(1, (8, -1)).any(dim=2).any(dim=0)
    changed = [name for name, use in zip(memory.parameter_names, used, strict=True) if use]
    assert set(changed) <= set(report.changed) <= set(memory.parameter_names)
    assert min(edit["reached"] for edit in report.details["edits"]) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_trained_mixture_of_experts_learns_facts_by_memit_and_keeps_the_others(family: str) -> None:
    model, tokenizer, homes, texts = _trained(family)
    people = list(homes)
    chosen = people[::4]
    others = {person: homes[person] for person in people if person not in chosen}
    towns = sorted(set(homes.values()))
    wanted = {person: towns[towns.index(homes[person]) - 1] for person in chosen}
    edits = [Edit(f"the home of {person}", person, town) for person, town in wanted.items()]
    assert _share_right(model, tokenizer, homes) == 1.0
    assert _share_right(model, tokenizer, wanted) == 0.0
    routers = _routers(model)
    apply(
        model,
        tokenizer,
        "memit",
        edits=edits,
        calibration=texts,
        layers=[1],
        contexts_per_length=3,
        context_lengths=[3],
        covariance_weight=10.0,
    )
    assert all(torch.equal(before, now) for before, now in zip(routers, _routers(model), strict=True))
    assert _share_right(model, tokenizer, wanted) == 1.0
    assert _share_right(model, tokenizer, others) >= 0.9


def _trained(family: str) -> tuple[Any, Any, dict[str, str], list[str]]:
    """Train a small mixture of experts until it knows where 28 people live and what they do."""
    people = [f"A{n % 7} B{n // 7}" for n in range(28)]
    homes = {person: f"C{n * 5 % 12}" for n, person in enumerate(people)}
    texts = [
        f"{start} home of {person} {town}" for person, town in homes.items() for start in ("the", "people say the")
    ]
    texts += [f"the job of {person} J{n * 3 % 8}" for n, person in enumerate(people)]
    words = [*SPECIAL.values(), *sorted({word for text in texts for word in text.split()}), "The", "Therefore", "."]
    tokenizer = word_tokenizer([*words, "Because", "I", "You", "a", "is"])
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    config = {
        "mixtral": lambda: transformers.MixtralConfig(**sizes, intermediate_size=48, num_local_experts=8),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **sizes, moe_intermediate_size=32, num_experts=16, head_dim=12
        ),
    }[family]()
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(250):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, homes, texts


@torch.no_grad()
def _share_right(model: Any, tokenizer: Any, homes: dict[str, str]) -> float:
    batch = tokenizer([f"the home of {person}" for person in homes], return_tensors="pt", padding=True)
    said = model(**batch).logits[:, -1].argmax(dim=1)
    return sum(map(str.__eq__, tokenizer.convert_ids_to_tokens(said), homes.values())) / len(homes)
