"""Where eight families keep their layers, by name: an independent formulation of what is found by running a model."""

from __future__ import annotations

from interventions.layouts import GroupLayout, Layout


def _llama_like(name: str, mlp_norm: str) -> Layout:
    return Layout(
        name,
        "norm",
        (
            GroupLayout(
                "attention_in",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "input_layernorm",
                scope="self_attn",
            ),
            GroupLayout("attention_out", ("self_attn.o_proj",), "self_attn.v_proj"),
            GroupLayout("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), mlp_norm, scope="mlp"),
            GroupLayout("mlp_out", ("mlp.down_proj",), "mlp.up_proj"),
        ),
    )


LAYOUTS = (
    # Before Llama's: these blocks have Llama's names too, and two more norms.
    _llama_like("gemma2, gemma3", "pre_feedforward_layernorm"),
    _llama_like("llama, mistral, qwen2, qwen3, gemma", "post_attention_layernorm"),
    Layout(
        "phi3",
        "norm",
        (
            GroupLayout("attention_in", ("self_attn.qkv_proj",), "input_layernorm", scope="self_attn"),
            GroupLayout("attention_out", ("self_attn.o_proj",), "self_attn.qkv_proj", previous_parts=3),
            GroupLayout("mlp_in", ("mlp.gate_up_proj",), "post_attention_layernorm", scope="mlp"),
            GroupLayout("mlp_out", ("mlp.down_proj",), "mlp.gate_up_proj", previous_parts=2),
        ),
    ),
    # A GELU between the two MLP layers does not commute with scaling: no `previous` for the second.
    # The fused rows of query_key_value interleave q, k and v by head: none for the attention output.
    Layout(
        "gpt_neox",
        "final_layer_norm",
        (
            GroupLayout("attention_in", ("attention.query_key_value",), "input_layernorm", scope="attention"),
            GroupLayout("attention_out", ("attention.dense",)),
            GroupLayout("mlp_in", ("mlp.dense_h_to_4h",), "post_attention_layernorm", scope="mlp"),
            GroupLayout("mlp_out", ("mlp.dense_4h_to_h",)),
        ),
    ),
    # ln_1 feeds attention and MLP at once: none for either.
    Layout(
        "gptj",
        "ln_f",
        (
            GroupLayout("attention_in", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), scope="attn"),
            GroupLayout("attention_out", ("attn.out_proj",), "attn.v_proj"),
            GroupLayout("mlp_in", ("mlp.fc_in",), scope="mlp"),
            GroupLayout("mlp_out", ("mlp.fc_out",)),
        ),
    ),
    Layout(
        "phi",
        "final_layernorm",
        (
            GroupLayout(
                "attention_in",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                scope="self_attn",
            ),
            GroupLayout("attention_out", ("self_attn.dense",), "self_attn.v_proj"),
            GroupLayout("mlp_in", ("mlp.fc1",), scope="mlp"),
            GroupLayout("mlp_out", ("mlp.fc2",)),
        ),
    ),
    Layout(
        "opt",
        "final_layer_norm",
        (
            GroupLayout(
                "attention_in",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "self_attn_layer_norm",
                scope="self_attn",
            ),
            GroupLayout("attention_out", ("self_attn.out_proj",), "self_attn.v_proj"),
            GroupLayout("mlp_in", ("fc1",), "final_layer_norm"),
            GroupLayout("mlp_out", ("fc2",), "fc1"),
        ),
    ),
    Layout(
        "gpt2",
        "ln_f",
        (
            GroupLayout("attention_in", ("attn.c_attn",), "ln_1", scope="attn"),
            GroupLayout("attention_out", ("attn.c_proj",), "attn.c_attn", previous_parts=3),
            GroupLayout("mlp_in", ("mlp.c_fc",), "ln_2", scope="mlp"),
            GroupLayout("mlp_out", ("mlp.c_proj",)),
        ),
    ),
)
