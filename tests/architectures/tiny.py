"""A tiny random model of every architecture in transformers' mapping of causal language models.

The sizes of the default config are shrunk by name; what that leaves inconsistent stands in `EXTRA`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tokenizers import VOCABULARY

ARCHITECTURES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


@dataclass(frozen=True)
class Size:
    """Sizes that the others follow from."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    positions: int = 512

    @property
    def head(self) -> int:
        return self.hidden // self.heads


SMALL = Size()
"""Enough for every check."""
Rule = tuple[str, Callable[[Size, int], int]]
_RULES: tuple[Rule, ...] = (
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input", lambda size, old: VOCABULARY),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width"
        r"|input_embedding_size|output_embedding_size|backbone_hidden_size|hidden_size_global|out_hidden_size"
        r"|ple_embed_dim|projector_(in|out)put_dim|vision_output_dim|output_channels",
        lambda size, old: size.hidden,
    ),
    (r"attention_hidden_size", lambda size, old: size.hidden),
    (r"router_hidden_size", lambda size, old: size.hidden // 2),
    (
        r".*intermediate_size|(en|de)coder_ffn_dim|ffn_dim|n_inner|inner_dim|(expert_)?ffn_hidden_size|dff|d_inner"
        r"|dim_ff|feed_forward_size|intermediate_size_mlp|mlp_dim",
        lambda size, old: size.hidden * 3 // 2 if old else 0,
    ),
    (
        r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks|depth"
        r"|num_layers_per_stack|num_global_layers|conf_num_hidden_layers",
        lambda size, old: size.layers,
    ),
    (
        r"(num|en|de|conf_num).*attention_heads|num_(en|de)coder_attention_heads|n_heads?|num_heads"
        r"|attention_heads|swa_num_attention_heads|linear_num_heads",
        lambda size, old: size.heads,
    ),
    (r"linear_num_value_heads", lambda size, old: size.heads),
    (r"num_key_value_heads|swa_num_key_value_heads|num_kv_heads|linear_num_key_heads", lambda size, old: 2),
    (
        r"(swa_|global_)?head_dim|attention_head_dim|kv_channels|dim_head|d_head|attention_head_size|v_head_dim"
        r"|linear_(key|value)_head_dim|linear_head_dim|index_head_dim|qk_nope_head_dim|qk_rope_head_dim",
        lambda size, old: size.head,
    ),
    (r"qk_head_dim", lambda size, old: 2 * size.head),
    (r"rotary_dim", lambda size, old: size.head // 2),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_target_positions"
        r"|original_max_position_embeddings",
        lambda size, old: size.positions,
    ),
    (r"max_source_positions", lambda size, old: 64),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", lambda size, old: 4 if old > 1 else old),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k", lambda size, old: min(old, 2)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda size, old: min(old, 1)),
    (r"n_group|topk_group|num_expert_group|zero_expert_num", lambda size, old: min(old, 1)),
    (r"(kv|q|o)_lora_rank|laurel_rank|gated_norm_rank|hc_lowrank|adapter_rank|d_rel", lambda size, old: 8),
    (r"hidden_size_per_layer_input", lambda size, old: 8),
    (r"mamba_d_state|state_size|ssm_state_size", lambda size, old: 8),
    (r"mamba_n_heads|mamba_num_heads", lambda size, old: 2 * size.heads),
    (r"n_mamba_heads", lambda size, old: 2),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", lambda size, old: size.head),
    (r"time_step_rank|mamba_dt_rank", lambda size, old: 4),
    (r"n_groups|mamba_ngroups", lambda size, old: min(old, 2)),
    (r"mamba_d_ssm", lambda size, old: 2 * size.hidden),
    (r"mamba_chunk_size|chunk_size|index_topk|block_size|index_block_size", lambda size, old: min(old, 16)),
    (
        r"sliding_window|sliding_window_size|attention_window_size|local_attention|window_size|attention_chunk_size",
        lambda size, old: min(old, 16),
    ),
    (r"image_size|crop_size", lambda size, old: 32),
    (
        r"num_centroids|encoder_hash_byte_group_vocab|codebook_size|ngram_vocab_size_base"
        r"|.*_vocab_size",
        lambda size, old: min(old, 64),
    ),
    (r".*_token_(id|index)|.*_index|vocab_offset", lambda size, old: old if old < 3 else 3 + old % 7),
)

_ABSENT: dict[str, Callable[[Size], int]] = {
    "num_key_value_heads": lambda size: size.heads,
    "head_dim": lambda size: size.head,
    "n_routed_experts": lambda size: 4,
    "num_experts_per_tok": lambda size: 2,
    "n_shared_experts": lambda size: 1,
    "n_group": lambda size: 1,
    "topk_group": lambda size: 1,
}
"""Sizes that some defaults leave open."""


def _indexer(size: Size) -> dict[str, Any]:
    heads = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": size.head}
    return {**heads, "indexer_budget": 16, "indexer_compress_ratio": 4}


_GEMMA4 = {"per_layer_config": None, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_ASSISTANT = {
    "text_config": {
        "model_type": "gemma4_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }
}
EXTRA: dict[str, Callable[[Size], dict[str, Any]]] = {
    "bamba": lambda size: {"attn_layer_indices": [1]},
    "cohere_compass_text": lambda size: {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, size.head // 2 - 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "gemma3n": lambda size: {"text_config": {"num_kv_shared_layers": 0}},
    "gemma3n_text": lambda size: {"num_kv_shared_layers": 0},
    "gemma4": lambda size: {"text_config": _GEMMA4},
    "gemma4_text": lambda size: _GEMMA4,
    "gemma4_unified": lambda size: {"text_config": _GEMMA4},
    "gemma4_unified_text": lambda size: _GEMMA4,
    "gemma4_assistant": lambda size: _ASSISTANT,
    "gemma4_unified_assistant": lambda size: _ASSISTANT,
    "granitemoehybrid": lambda size: {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_moe": lambda size: {"num_experts": 4, "moe_topk": 2},
    "hrm_text": lambda size: {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 2},
    "jamba": lambda size: {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": lambda size: {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": lambda size: {"num_heads": 2 * size.heads, "head_dim": size.head},
    "qwen4_exp": lambda size: {"text_config": _indexer(size)},
    "qwen4_exp_text": _indexer,
    "recurrent_gemma": lambda size: {"block_types": ["recurrent", "attention"]},
    "reformer": lambda size: {
        "axial_pos_embds_dim": [size.hidden // 2, size.hidden // 2],
        "axial_pos_shape": [8, size.positions // 8],
    },
    "xlstm": lambda size: {"chunk_size": size.head, "ffn_round_up_to_multiple_of": 16},
    "xmod": lambda size: {"default_language": "en_XX"},
    "zamba": lambda size: {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 2 * size.hidden,
        "attention_head_dim": 2 * size.head,
    },
    "zamba2": lambda size: {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 2 * size.heads,
        "mamba_headdim": size.head,
        "attention_hidden_size": 2 * size.hidden,
        "attention_head_dim": 2 * size.head,
        "num_query_groups": size.heads,
        "hybrid_layer_ids": [1, 3],
    },
}
"""By model type: values that no rule gives; nested configs as dicts."""
_KIND = ("model_type", "transformers_version", "architectures", "num_labels", "label2id", "id2label", "dtype")
_RUN = ("_name_or_path", "output_attentions", "output_hidden_states", "return_dict")


def tiny_config(model_type: str, size: Size = SMALL) -> Any:
    """Return a small config of a model type. Raises whatever the config's own checks raise."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    kind = transformers.CONFIG_MAPPING[model_type]
    try:
        default = kind()
    except Exception:  # a config of several models, which has no default
        kind = getattr(transformers, name).config_class
        default = kind()
    values = _shrunk(default.to_dict(), size)
    values = _merged(values, EXTRA.get(model_type, lambda size: {})(size))
    for key in _KIND:
        values.pop(key, None)
    config = kind(**values)
    if model_type == "dbrx":
        # Which the model reads and its config no longer has.
        config.attn_config.rope_theta, config.attn_config.clip_qkv = 10000.0, 8.0
    return config


def tiny(model_type: str, size: Size = SMALL, seed: int = 0) -> Any:
    """Build a tiny random model whose norms and biases are not trivial, in eval mode."""
    config = tiny_config(model_type, size)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: Any = _class_of(config, model_type)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and re.search(r"norm|ln_|bias$", name):
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif parameter.dim() >= 2 and 0 < float(parameter.std()) < 0.05:
                    parameter.mul_(5)  # the default of 0.02 leaves every block close to the identity
    return model.float().eval()


def _class_of(config: Any, model_type: str) -> Callable[[Any], Any]:
    """Return what makes a model of a config: the auto class, unless it does not take the config."""
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM.from_config
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])  # type: ignore[no-any-return]


def _shrunk(values: Mapping[str, Any], size: Size, depth: int | None = None) -> dict[str, Any]:
    """Return a config's values with its sizes shrunk, lists with an entry for each layer included."""
    chosen = _chosen_layers(values, size)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in _RUN:
            continue
        if isinstance(value, Mapping) and not key.startswith(("rope", "label2id", "id2label")):
            found[key] = _shrunk(value, size)
        elif value is None:
            found[key] = _ABSENT[key](size) if key in _ABSENT else None
        elif isinstance(value, bool):
            found[key] = value or key == "is_decoder"  # without, an encoder
        elif isinstance(value, int):
            found[key] = _shrunk_number(key, value, values, size)
        elif isinstance(value, list | tuple) and chosen and len(value) == chosen[0]:
            found[key] = [
                _shrunk_number(key, value[i], values, size) if type(value[i]) is int else value[i] for i in chosen[1]
            ]
        elif key.endswith("_token_id") and isinstance(value, list):
            found[key] = 1
        else:
            found[key] = value
    if chosen:
        for key in found:
            if key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
                found[key] = len(chosen[1])
    return found


def _chosen_layers(values: Mapping[str, Any], size: Size) -> tuple[int, list[int]] | None:
    """Return the number of layers and those to keep: one of each kind, and at least as many as `size` says."""
    count = next((values[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in values), None)
    lists = [value for value in values.values() if isinstance(value, list | tuple) and len(value) == count]
    if not count or count < 3 or not lists:
        return None
    kinds = list(zip(*(map(str, value) for value in lists if not _numbers(value)), strict=True)) or [()] * count
    firsts = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    keep = set(firsts.values())
    for number in range(count):
        if len(keep) < size.layers:
            keep.add(number)
    return count, sorted(keep)


def _numbers(value: Any) -> bool:
    return all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)


def _shrunk_number(key: str, old: int, values: Mapping[str, Any], size: Size) -> int:
    if key in ("num_key_value_heads", "num_kv_heads"):
        heads = values.get("num_attention_heads", values.get("n_head"))
        return size.heads if old == heads else 1 if old == 1 else 2
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, key):
            return rule(size, old)
    return old


def _merged(values: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            values[key] = _merged(values[key], value)
        else:
            values[key] = value
    return values
