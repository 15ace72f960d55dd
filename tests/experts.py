"""Tiny random models with routed experts, for the tokenizer that `tiny_tokenizer` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.models import _SIZE as SIZE
from tests.models import tiny_model

_SIZE: dict[str, Any] = SIZE | {"intermediate_size": 24, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_NARROW: dict[str, Any] = _SIZE | {"moe_intermediate_size": 16, "head_dim": 8}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SIZE, num_local_experts=8),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_NARROW, num_experts=8, shared_expert_intermediate_size=24, decoder_sparse_step=1
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_NARROW, num_experts=8),
    "olmoe": lambda: transformers.OlmoeConfig(**_SIZE, num_experts=8),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SIZE, head_dim=8, num_local_experts=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SIZE, head_dim=8, num_local_experts=8, intermediate_size_mlp=24, interleave_moe_layer_step=1
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_SIZE, num_local_experts=8),
    "phimoe": lambda: transformers.PhimoeConfig(**_SIZE, num_local_experts=8),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **_NARROW, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_NARROW | _MLA, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        **{k: v for k, v in _SIZE.items() if k != "num_attention_heads"}, kv_channels=8, num_local_experts=8
    ),
}


def tiny_experts(family: str = "mixtral", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Build a random model of a family, whose experts differ and whose router is not trivial."""
    config = CONFIGS[family]()
    config.update(changes)
    model = tiny_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
    return model.to(dtype).eval()
