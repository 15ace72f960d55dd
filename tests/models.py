"""Tiny random models of every supported family, for the tokenizer that `tiny_tokenizer` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.tokenizers import SENTENCES as SENTENCES
from tests.tokenizers import VOCABULARY as VOCABULARY
from tests.tokenizers import tiny_tokenizer as tiny_tokenizer

_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_OPT: dict[str, Any] = {k: v for k, v in _SIZE.items() if k != "intermediate_size"} | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZE),
    "llama-gqa": lambda: transformers.LlamaConfig(**_SIZE, num_key_value_heads=2),
    "llama-odd": lambda: transformers.LlamaConfig(**_SIZE | {"intermediate_size": 45}),
    "llama-bias": lambda: transformers.LlamaConfig(**_SIZE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_SIZE, num_key_value_heads=2, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZE, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZE, num_key_value_heads=2, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**_SIZE, num_key_value_heads=4, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZE, num_key_value_heads=1, head_dim=8, sliding_window=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZE, num_key_value_heads=1, head_dim=8, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**_SIZE),
    "phi3-gqa": lambda: transformers.Phi3Config(**_SIZE, num_key_value_heads=2),
    "phi": lambda: transformers.PhiConfig(**_SIZE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZE),
    "gptj": lambda: transformers.GPTJConfig(**_GPT, rotary_dim=4),
    "opt": lambda: transformers.OPTConfig(**_OPT),
    "opt-post-norm": lambda: transformers.OPTConfig(**_OPT | {"word_embed_proj_dim": 16}, do_layer_norm_before=False),
    "gpt2": lambda: transformers.GPT2Config(**_GPT),
}


def tiny_model(
    family: str | transformers.PretrainedConfig = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """Build a random model of a family, or of a config, whose norms, biases and channel sizes are not trivial."""
    config = CONFIGS[family]() if isinstance(family, str) else family
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif parameter.dim() == 2:
                    parameter.mul_(5)  # the default of 0.02 leaves every block close to the identity
    return model.to(dtype).eval()


def share_of_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Return the share of weights that are the same, to float32's rounding."""
    pairs = [(p.cpu(), q.cpu()) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
    same = sum(int(torch.isclose(p, q, rtol=1e-3, atol=1e-5).sum()) for p, q in pairs)
    return same / sum(p.numel() for p, _ in pairs)
