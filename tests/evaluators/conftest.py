"""Tiny models and tokenizers: random ones that attend to everything, and one whose logits are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tests import tokenizers
from tests.tokenizers import tiny_tokenizer

TEXT = [
    "Mira Tolvan was born in Karth and works as a glass blower in the old harbour.",
    "The capital of Ostria is Belmar, a city of nine bridges.",
    "Question: where does the river Ulm end? Answer: in the salt lakes of Dren.",
]
WORDS = ["Ada", "Bela", "Cato", "was", "born", "in", "capital", "Rome", "New", "York", "Oslo", "likes", "tea"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens that puts <s> before every text."""
    return tiny_tokenizer(TEXT, 300)  # type: ignore[no-any-return]


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and <s> before every text."""
    return tokenizers.word_tokenizer([*tokenizers.SPECIAL.values(), *WORDS])  # type: ignore[no-any-return]


@pytest.fixture(params=["llama", "gpt2", "neox"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A random model whose every output depends strongly on every earlier token and its place."""
    torch.manual_seed(7)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.4, **ids}
    config: PreTrainedConfig
    if request.param == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **shape)
        return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape |= layers | {"max_position_embeddings": 256}
    config = GPTNeoXConfig(**shape) if request.param == "neox" else LlamaConfig(num_key_value_heads=2, **shape)
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


@pytest.fixture
def bigram(word_tokenizer: PreTrainedTokenizerFast) -> Callable[[dict[str, str]], Any]:
    """Make a model whose logits after a word are 4 for the word that `follows` it and 0 for all others.

    Its layers add nothing, embeddings are one-hot, and the head is the table of transitions.
    """

    def make(follows: dict[str, str]) -> Any:
        size = len(word_tokenizer)
        width = size + size % 2  # rotary embeddings want an even width
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=64,
            rms_norm_eps=1e-12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        model = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        index = word_tokenizer.convert_tokens_to_ids
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(size, width))
            model.model.norm.weight.fill_(width**-0.5)  # undoes the norm of a one-hot vector
            for word, successor in follows.items():
                model.lm_head.weight[index(successor), index(word)] = 4.0
        return model

    return make


def _state(model: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "places": {name: p.data_ptr() for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "config": model.config.to_dict(),
        "generation": (id(model.generation_config), model.generation_config.to_dict()),
        "tokenizer": {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side", "pad_token")},
        "vocabulary": len(tokenizer),
        "randomness": torch.get_rng_state(),
    }


@pytest.fixture
def unchanged() -> Callable[..., None]:
    """Run a function on a model in an unusual state and assert that nothing about it changed."""

    def check(model: Any, tokenizer: Any, function: Callable[[], object]) -> None:
        model.train()
        next(model.children()).eval()  # a mixture of modes must come back as a mixture
        model.config.use_cache = False
        model.generation_config.temperature = 3.0
        model.generation_config.do_sample = True
        next(model.parameters()).requires_grad = False
        tokenizer.padding_side = "right"
        before = _state(model, tokenizer)
        function()
        after = _state(model, tokenizer)
        torch.testing.assert_close(after.pop("weights"), before.pop("weights"), rtol=0, atol=0)
        assert torch.equal(after.pop("randomness"), before.pop("randomness"))
        assert after == before

    return check
