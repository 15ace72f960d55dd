"""The anatomy found by running a model: against a table of names, without effect on the model, for any block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.layouts import Layout
from interventions.structure import Anatomy, Block
from tests.architectures.tiny import tiny
from tests.interventions.layout_table import LAYOUTS
from tests.models import CONFIGS, SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]


def path(block: Block, module: nn.Module | None) -> str | None:
    return next((name for name, own in block.module.named_modules() if own is module), None)


def described(anatomy: Anatomy) -> list[list[tuple[Any, ...]]]:
    """Role, layers, foldable operation and scope of every group of every block, by name."""
    return [
        [
            (
                group.role,
                tuple(linear.name.removeprefix(f"{block.name}.") for linear in group.linears),
                path(block, group.previous),
                path(block, group.scope),
            )
            for group in block.linear_groups
        ]
        for block in anatomy.blocks
    ]


def has(block: nn.Module, layout: Layout) -> bool:
    names = [name for group in layout.groups for name in (*group.linears, group.previous, group.scope)]
    return {name for name in names if name} <= {name for name, _ in block.named_modules()}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_what_is_found_is_what_the_table_of_names_says(family: str) -> None:
    model = tiny_model(family)
    found = find_anatomy(model)
    assert all(group.number == 0 for block in found.blocks for group in block.linear_groups)
    model.lmcompose_layout = next(layout for layout in LAYOUTS if has(found.blocks[0].module, layout))
    declared = find_anatomy(model)
    assert declared is not found
    assert described(found) == described(declared)
    assert [(block.name, block.module, dict(block.left)) for block in found.blocks] == [
        (block.name, block.module, {}) for block in declared.blocks
    ]
    assert found.embeddings is declared.embeddings and found.head is declared.head
    assert found.final_norm is declared.final_norm or type(found.final_norm) is type(declared.final_norm) is nn.Identity


ATTENTION = ("attention_in", "attention_out", "mlp_in", "mlp_out")


@pytest.mark.parametrize(
    ("model_type", "roles"),
    [
        ("bloom", [ATTENTION] * 2),  # ALiBi
        ("falcon", [ATTENTION] * 2),  # multi-query, parallel
        ("cohere2", [ATTENTION] * 2),  # parallel, sliding windows, scaled logits
        ("olmo2", [ATTENTION] * 2),  # norms after
        ("modernbert-decoder", [ATTENTION] * 2),  # fused gate and up
        ("minicpm3", [("attention_in", "attention_in #1", "attention_in #2", *ATTENTION[1:])] * 2),  # latent attention
        ("mamba2", [("mixer_in", "mixer_out")] * 2),  # state space
        ("falcon_h1", [("mixer_in", "mixer_out", *ATTENTION)] * 2),  # attention beside a state space
        ("bamba", [("mixer_in", "mixer_out", "mlp_in", "mlp_out"), ATTENTION]),  # kinds of blocks in one list
        ("qwen3_5_text", [("mixer_in", "mixer_out", "mlp_in", "mlp_out"), ATTENTION]),  # linear attention
        ("lfm2", [ATTENTION] * 2),
    ],
)
def test_kinds_of_blocks(model_type: str, roles: list[tuple[str, ...]]) -> None:
    blocks = find_anatomy(tiny(model_type)).blocks
    assert [tuple(group.key for group in block.linear_groups) for block in blocks] == roles


class Renamed(nn.Module):
    """A gated MLP with names of its own."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.c, self.a, self.b, self.act = mlp.down_proj, mlp.gate_proj, mlp.up_proj, mlp.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(hidden) * self.act(self.a(hidden)))  # type: ignore[no-any-return]


def test_names_do_not_matter() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = Renamed(block.mlp)
    for block in described(find_anatomy(model)):
        assert block[2:] == [
            ("mlp_in", ("mlp.b", "mlp.a"), "post_attention_layernorm", "mlp"),
            ("mlp_out", ("mlp.c",), "mlp.b", None),
        ]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_values_do_not_matter(family: str, value: float) -> None:
    model = tiny_model(family)
    wanted = described(find_anatomy(model))
    with torch.no_grad():
        for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
            linear.module.weight.fill_(value)  # type: ignore[operator, union-attr]
    model.train(not model.training)  # which does not matter either
    assert described(find_anatomy(copy.deepcopy(model))) == wanted


@pytest.mark.parametrize("model_type", ["llama", "bamba", "gemma3n_text", "reformer"])
def test_finding_changes_nothing(model_type: str) -> None:
    model = tiny(model_type)
    model.train()
    model.get_output_embeddings().eval()

    def state() -> Any:
        return (
            {name: value.clone() for name, value in model.state_dict().items()},
            torch.get_rng_state(),
            [
                (m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
                for m in model.modules()
            ],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            model.config.to_dict(),
        )

    before = state()
    try:
        find_anatomy(model)
    except InterventionError:
        assert model_type == "reformer"
    after = state()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_an_anatomy_is_found_once_until_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    passes: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    first = find_anatomy(model)
    assert find_anatomy(model) is first and len(passes) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert find_anatomy(model) is first
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.clamp(-1, 1))
    assert find_anatomy(model) is not first
    second = find_anatomy(model)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight.clone())
    assert find_anatomy(model) is not second


def test_layers_that_stay_as_they_are_are_named_with_the_reason(tokenizer: Any) -> None:
    model = tiny("mamba")
    block = find_anatomy(model).blocks[0]
    assert dict(block.left) == {"backbone.layers.0.mixer.dt_proj": "it is not called"}
    report = apply(model, tokenizer, "rtn", bits=4, group_size=16)
    assert any("dt_proj" in warning and "not called" in warning for warning in report.warnings)


def test_a_model_of_one_block_has_one_block() -> None:
    config = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"num_hidden_layers": 1})
    assert [block.name for block in find_anatomy(tiny_model(config)).blocks] == ["model.layers.0"]


@pytest.mark.parametrize("model_type", ["xlm", "prophetnet", "hrm_text", "cpmant"])
def test_what_cannot_be_worked_on_block_by_block_is_refused(model_type: str) -> None:
    with pytest.raises(InterventionError, match="lmcompose_layout"):
        find_anatomy(tiny(model_type))
