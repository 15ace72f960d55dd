"""How much faster RMU and gradient difference are than the plain forms, both timed in one run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from interventions import Resources, apply
from tests.models import SENTENCES, VOCABULARY

pytestmark = pytest.mark.benchmark
UPDATES = 8
BATCH = 4
LONGEST = 256


def _model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def _texts(lengths: list[int]) -> tuple[str, ...]:
    """Texts of so many sentences."""
    return tuple(" ".join(SENTENCES[(n + k) % 8] for k in range(length)) for n, length in enumerate(lengths))


def _ratio(plain: Callable[[], None], ours: Callable[[], None], rounds: int = 3) -> float:
    """Time both in turn and return how many times longer the plain form takes, best against best."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("plain", plain)):
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return min(seconds["plain"]) / min(seconds["ours"])


def _padded(tokenizer: Any, texts: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Batches in the given order, all of them padded to the longest length a text may have."""
    rows = tokenizer(list(texts), padding="max_length", max_length=LONGEST, truncation=True, return_tensors="pt")
    chosen = ("input_ids", "attention_mask")
    return [{key: rows[key][n : n + BATCH] for key in chosen} for n in range(0, len(texts), BATCH)]


def test_rmu_is_twice_as_fast_as_whole_passes_of_two_models(tokenizer: Any) -> None:
    model = _model()
    layer = 3
    texts = _texts([3] * BATCH * UPDATES)
    resources = Resources(forget={"topic": texts}, retain=texts)

    def ours() -> None:
        apply(copy.deepcopy(model), tokenizer, "rmu", resources=resources, layer=layer, max_num_batches=UPDATES)

    def state(model: Any, batch: dict[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []
        block = model.model.layers[layer]
        handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
        model(**batch, use_cache=False)
        handle.remove()
        return seen[0]

    def plain() -> None:
        updated, frozen = copy.deepcopy(model), copy.deepcopy(model)
        trained = [updated.model.layers[n].mlp.down_proj.weight for n in range(layer - 2, layer + 1)]
        optimizer = torch.optim.AdamW(trained, lr=5e-5)
        control = torch.rand(128)
        for n in range(UPDATES):
            rows = tokenizer(list(texts[n * BATCH : (n + 1) * BATCH]), padding=True, return_tensors="pt")
            batch = {key: rows[key] for key in ("input_ids", "attention_mask")}
            steered = state(updated, batch)
            with torch.no_grad():
                was = state(frozen, batch)
            loss = mse_loss(steered, control.expand_as(steered)) + 100 * mse_loss(state(updated, batch), was)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert _ratio(plain, ours) >= 2.0


def test_gradient_difference_is_twice_as_fast_as_padding_to_the_longest_text(tokenizer: Any) -> None:
    model = _model()
    # As many texts of one sentence as of two, three and four: about 30 to 130 tokens.
    forget, retain = (_texts([1 + n % 4 for n in range(BATCH * UPDATES)]) for _ in range(2))

    def ours() -> None:
        resources = Resources(forget={"topic": forget}, retain=retain)
        apply(copy.deepcopy(model), tokenizer, "gd", resources=resources, samples=None, batch_size=BATCH)

    def plain() -> None:
        updated = copy.deepcopy(model)
        blocks: list[nn.Module] = [*updated.model.layers[4:], updated.model.norm, updated.lm_head]
        for parameter in updated.parameters():
            parameter.requires_grad_(False)
        trained = [parameter.requires_grad_(True) for block in blocks for parameter in block.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=5e-5)
        for lost, kept in zip(_padded(tokenizer, forget), _padded(tokenizer, retain), strict=True):
            for sign, batch in ((-1, lost), (1, kept)):
                logits = updated(**batch, use_cache=False).logits[:, :-1]
                labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
                (sign * cross_entropy(logits.flatten(0, 1), labels.flatten())).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert _ratio(plain, ours) >= 2.0
