"""Statistics equal what a plain forward pass over every text alone would give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interventions import InterventionError
from interventions.anatomy import find_anatomy
from interventions.statistics import InputStatistics, collect_statistics, token_batches
from tests.models import SENTENCES, tiny_model, tiny_tokenizer


def test_batches_hold_every_text_once_longest_first_padded_right(tokenizer: object) -> None:
    batches = token_batches(tokenizer, SENTENCES[:7], max_tokens=12, batch_size=3)
    rows = []
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            rows.append(ids[:length].tolist())
    expected = [tokenizer(text)["input_ids"][:12] for text in SENTENCES[:7]]  # type: ignore[operator]
    assert sorted(rows) == sorted(expected)
    assert [len(row) for row in rows] == sorted((len(row) for row in expected), reverse=True)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]


def test_batches_stay_within_a_number_of_tokens(tokenizer: object) -> None:
    texts = [text[: 4 + 7 * i] for i, text in enumerate(SENTENCES)]
    batches = token_batches(tokenizer, texts, max_tokens=100, batch_tokens=40)
    sizes = [batch["input_ids"].numel() for batch in batches]
    assert sum(len(batch["input_ids"]) for batch in batches) == len(texts)
    assert any(len(batch["input_ids"]) > 1 for batch in batches)
    for batch, size in zip(batches, sizes, strict=True):
        assert size <= 40 or len(batch["input_ids"]) == 1


def test_tokenising_leaves_the_tokenizer_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    token_batches(tokenizer, SENTENCES, max_tokens=5, batch_size=2)
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "left"
    assert len(tokenizer(SENTENCES[0])["input_ids"]) > 5  # no truncation left on


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((), "at least one"),
        (("fine", "  "), "text 1 is empty"),
        ("one string", "not one string"),
    ],
)
def test_texts_that_cannot_be_used_are_named(tokenizer: object, texts: object, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        token_batches(tokenizer, texts, max_tokens=8, batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "opt", "gemma3"])
def test_sums_equal_those_of_single_unpadded_texts(family: str, tokenizer: object) -> None:
    model = tiny_model(family)
    blocks = find_anatomy(model).blocks
    linears = [linear for block in blocks for linear in block.linears]
    batches = token_batches(tokenizer, SENTENCES, max_tokens=60, batch_size=3)
    assert any(int(batch["attention_mask"].min()) == 0 for batch in batches)  # some padding
    found = collect_statistics(model, batches, linears)

    inputs: dict[str, list[Tensor]] = {linear.name: [] for linear in linears}
    for linear in linears:
        linear.module.register_forward_hook(
            lambda module, args, output, name=linear.name: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for text in SENTENCES:
            model(torch.tensor([tokenizer(text)["input_ids"][:60]]))  # type: ignore[operator]
    for name, statistics in found.items():
        x = torch.cat(inputs[name]).double()
        assert statistics.count == len(x)
        torch.testing.assert_close(statistics.gram.double(), x.t() @ x, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(statistics.mean_abs().double(), x.abs().mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.second_moment().double(), (x.t() @ x) / len(x), rtol=1e-3, atol=1e-3)


def test_linears_that_share_an_input_share_its_statistics(tokenizer: object) -> None:
    model = tiny_model("llama")
    block = find_anatomy(model).blocks[0]
    batches = token_batches(tokenizer, SENTENCES, max_tokens=20, batch_size=4)
    found = collect_statistics(model, batches, block.linears)
    q, k, v, o, gate, up, down = (found[linear.name] for linear in block.linears)
    assert q is k is v
    assert gate is up
    assert len({id(s) for s in (q, o, gate, down)}) == 4


def test_the_forward_pass_ends_at_the_last_wanted_layer(tokenizer: object) -> None:
    model = tiny_model("llama")
    blocks = find_anatomy(model).blocks
    later: list[str] = []
    blocks[0].mlp_output.module.register_forward_hook(lambda *_: later.append("down"))
    blocks[1].module.register_forward_pre_hook(lambda *_: later.append("block 1"))
    batches = token_batches(tokenizer, SENTENCES, max_tokens=20, batch_size=4)
    collect_statistics(model, batches, [blocks[0].mlp_output])
    assert later == []


def test_collecting_leaves_no_hook_and_no_mode_behind(tokenizer: object) -> None:
    model = tiny_model("llama").train()
    linears = find_anatomy(model).blocks[1].linears
    batches = token_batches(tokenizer, SENTENCES, max_tokens=20, batch_size=4)
    collect_statistics(model, batches, linears)
    assert all(module.training for module in model.modules())
    assert not any(linear.module._forward_pre_hooks for linear in linears)
    assert model(batches[0]["input_ids"]).logits.requires_grad


def test_sums_are_float32_whatever_the_model(tokenizer: object) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    linear = find_anatomy(model).blocks[0].mlp_output
    batches = token_batches(tokenizer, SENTENCES, max_tokens=20, batch_size=4)
    statistics = collect_statistics(model, batches, [linear])[linear.name]
    assert statistics.gram.dtype is statistics.abs_sum.dtype is torch.float32


def test_statistics_add_up() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    parts = InputStatistics.zeros(3)
    parts.add_(x[:2])
    parts.add_(x[2:])
    torch.testing.assert_close(parts.gram, x.t() @ x)
    torch.testing.assert_close(parts.abs_sum, x.abs().sum(0))
    assert parts.count == 7
