"""The anatomy is what it claims: every linear once, shared inputs shared, parts where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interventions import InterventionError
from interventions.anatomy import find_anatomy
from interventions.layouts import GroupLayout, Layout
from tests.models import CONFIGS, VOCABULARY, tiny_model

FAMILIES = sorted(CONFIGS)


def some_ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_is_in_one_group(family: str) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    assert len(anatomy.blocks) == 2
    for index, block in enumerate(anatomy.blocks):
        found = [linear.module for linear in block.linears]
        expected = [m for m in block.module.modules() if isinstance(m, nn.Linear | Conv1D)]
        assert sorted(map(id, found)) == sorted(map(id, expected))
        assert block.index == index
        assert model.get_submodule(block.name) is block.module
        assert [group.role for group in block.linear_groups] == [
            "attention_in",
            "attention_out",
            "mlp_in",
            "mlp_out",
        ]
        for linear in block.linears:
            assert model.get_submodule(linear.name) is linear.module
            assert dict(model.named_parameters())[linear.parameter_name] is linear.module.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_a_group_read_the_same_input_and_compute_w_x(family: str) -> None:
    model = tiny_model(family)
    blocks = find_anatomy(model).blocks
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: (inputs[0].clone(), output.clone())})

    for block in blocks:
        for linear in block.linears:
            linear.module.register_forward_hook(record(linear.name))
    with torch.no_grad():
        model(some_ids())
    for block in blocks:
        inputs = []
        for group in block.linear_groups:
            first = seen[group.linears[0].name][0]
            inputs.append(first)
            for linear in group.linears:
                x, y = seen[linear.name]
                assert torch.equal(x, first)
                bias = 0 if linear.bias is None else linear.bias
                torch.testing.assert_close(x @ linear.weight.t() + bias, y, atol=1e-4, rtol=1e-4)
        assert block.group("attention_out").linears[0].out_features == block.mlp_output.out_features == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_head_norm_and_embeddings_stand_at_the_ends(family: str) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    order: list[str] = []
    parts = {"embeddings": anatomy.embeddings, "norm": anatomy.final_norm, "head": anatomy.head}
    parts |= {block.name: block.module for block in anatomy.blocks}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        model(some_ids())
    norm = [] if family == "opt-post-norm" else ["norm"]  # that one has none
    assert order == ["embeddings", *(block.name for block in anatomy.blocks), *norm, "head"]


def foldable(family: str) -> dict[str, bool]:
    block = find_anatomy(tiny_model(family)).blocks[0]
    return {group.role: group.previous is not None for group in block.linear_groups}


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        ("llama", "attention_in attention_out mlp_in mlp_out"),
        ("llama-gqa", "attention_in mlp_in mlp_out"),
        ("gemma", "attention_in attention_out mlp_in mlp_out"),
        ("gemma2", "attention_in mlp_in mlp_out"),
        ("phi3", "attention_in attention_out mlp_in mlp_out"),
        ("phi3-gqa", "attention_in mlp_in mlp_out"),
        ("gpt_neox", "attention_in mlp_in"),
        ("gptj", "attention_out"),
        ("opt", "attention_in attention_out mlp_in mlp_out"),
        ("opt-post-norm", "attention_out mlp_out"),
        ("gpt2", "attention_in attention_out mlp_in"),
    ],
)
def test_which_groups_can_be_scaled_through_the_previous_operation(family: str, roles: str) -> None:
    assert [role for role, yes in foldable(family).items() if yes] == roles.split()


def test_a_gemma2_block_scales_its_mlp_through_the_norm_that_feeds_it() -> None:
    block = find_anatomy(tiny_model("gemma2")).blocks[0]
    assert block.group("mlp_in").previous is block.module.pre_feedforward_layernorm


def test_shared_weights_are_not_scaled() -> None:
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    for block in find_anatomy(model).blocks:
        assert block.group("attention_in").previous is None
        assert block.group("mlp_in").previous is not None


def test_weights_are_written_in_place_in_the_stored_dtype_and_orientation() -> None:
    for family in ("gpt2", "llama"):
        model = tiny_model(family, dtype=torch.bfloat16)
        linear = find_anatomy(model).blocks[0].group("mlp_in").linears[0]
        stored = linear.module.weight
        new = torch.randn(linear.out_features, linear.in_features)
        linear.set_weight_(new)
        assert linear.module.weight is stored
        assert stored.dtype is torch.bfloat16
        assert torch.equal(linear.weight, new.bfloat16())
        with pytest.raises(InterventionError, match=r"layers?\.0|h\.0"):
            linear.set_weight_(new.t())


def renamed() -> Any:
    """A model whose MLP output has a name of its own."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.down = block.mlp.down_proj
        del block.mlp.down_proj
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.down(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return model


def test_a_layout_that_does_not_fit_names_what_is_missing() -> None:
    model = renamed()
    model.lmcompose_layout = Layout("mine", "norm", (GroupLayout("mlp_out", ("mlp.down_proj",)),))
    with pytest.raises(InterventionError, match=r"model\.layers\.0.*mine.*mlp\.down_proj"):
        find_anatomy(model)


def test_a_model_that_cannot_run_says_why() -> None:
    model = renamed()
    del model.model.layers[0].mlp.down
    with pytest.raises(InterventionError, match=r"LlamaForCausalLM cannot be run .* no attribute 'down'"):
        find_anatomy(model)


def test_a_linear_layer_that_does_not_run_is_left_out() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.router = nn.Linear(32, 2)
    first, second = find_anatomy(model).blocks
    assert (dict(first.left), dict(second.left)) == ({}, {"model.layers.1.mlp.router": "it is not called"})


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(InterventionError, match="no input embeddings found"):
        find_anatomy(nn.Linear(2, 2))


def test_a_model_may_carry_its_own_layout() -> None:
    model = renamed()
    model.lmcompose_layout = Layout(
        "mine",
        "norm",
        (
            GroupLayout("attention_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            GroupLayout("attention_out", ("self_attn.o_proj",)),
            GroupLayout("mlp_in", ("mlp.gate_proj", "mlp.up_proj")),
            GroupLayout("mlp_out", ("mlp.down",), "mlp.up_proj"),
        ),
    )
    blocks = find_anatomy(model).blocks
    assert blocks[1].mlp_output.name == "model.layers.1.mlp.down"
