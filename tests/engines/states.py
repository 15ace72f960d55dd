"""A model that every engine knows and can pack, and how well compressed layers do on the text."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from interventions.anatomy import find_anatomy
from interventions.statistics import Batch, collect_statistics, window_batches
from interventions.structure import Linear
from tests.models import SENTENCES, VOCABULARY, tiny_tokenizer

TEXTS = tuple(" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES)))
TOKENS = 64
READ: dict[str, Any] = {"calibration": TEXTS, "samples": len(TEXTS), "max_tokens": TOKENS}
"""What compression methods are given: as many windows as there are texts, all of them full."""


def packable_model(seed: int = 0) -> Any:
    """Build a random Llama of two blocks whose widths are multiples of 32, some channels much larger than others."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
                    parameter[::9].mul_(6)
                else:
                    parameter.mul_(4)
    return model.eval()


def linears_of(model: Any, block: int = 0) -> dict[str, Linear]:
    """Return the linears of a block by the last part of their name."""
    return {linear.name.rpartition(".")[2]: linear for linear in find_anatomy(model).blocks[block].linears}


def grams(model: Any) -> dict[str, Tensor]:
    """Return the Gram matrix of the input of each linear of the first block."""
    statistics = collect_statistics(model, [windows()], list(linears_of(model).values()))
    return {name.rpartition(".")[2]: found.gram for name, found in statistics.items()}


@torch.no_grad()
def output_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """Return the squared error of a layer's output on the text, relative to the output: tr(dW G dW^T) / tr(W G W^T)."""
    delta = after - before
    return float(((delta @ gram) * delta).sum() / ((before @ gram) * before).sum())


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Return what a model says to the calibration text."""
    return model(windows()["input_ids"]).logits.float()  # type: ignore[no-any-return]


def windows() -> Batch:
    """Return the calibration text as one full batch."""
    (batch,) = window_batches(tiny_tokenizer(), TEXTS, samples=len(TEXTS), max_tokens=TOKENS)
    assert bool(batch["attention_mask"].all())
    return batch


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
