"""Scales are folded only where a block then computes the same, whatever its layers are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.folding import fold_, gain_offset
from interventions.layouts import GroupLayout, Layout
from interventions.offload import offload
from interventions.structure import LinearGroup
from tests.engines.fakes import interpreter_that, register_fake
from tests.models import CONFIGS, SENTENCES, VOCABULARY, tiny_model

# Importing the model of StarCoder uses it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]
ALL = "attention_in attention_out mlp_in mlp_out"


def config(kind: str, **settings: Any) -> Callable[[], transformers.PretrainedConfig]:
    """Describe a tiny model of a family."""
    special = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind in ("gpt_bigcode", "openai-gpt"):
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {"intermediate_size": 48}
    if kind in ("bitnet", "olmo", "diffllama", "gemma2", "gemma4_unified_text", "granite", "llama", "stablelm"):
        sizes |= {"num_key_value_heads": 4}
    if kind.startswith("gemma"):
        sizes |= {"head_dim": 8}
    return lambda: transformers.AutoConfig.for_model(kind, **special | sizes | settings)


FAMILIES: dict[str, tuple[Callable[[], transformers.PretrainedConfig], str]] = {
    # A norm between the value and the output layer, and one between up_proj and down_proj.
    "bitnet": (config("bitnet"), "attention_in mlp_in"),
    # Queries, keys and values are clipped; the norms have no gain.
    "olmo-clip": (config("olmo", clip_qkv=8.0), "mlp_out"),
    "olmo": (config("olmo"), "attention_out mlp_out"),
    # Pairs of heads are subtracted and then normalised.
    "diffllama": (config("diffllama"), "attention_in mlp_in mlp_out"),
    # Values are normalised.
    "gemma4": (config("gemma4_unified_text", global_head_dim=8), "attention_in mlp_in mlp_out"),
    # The norms stand after the residual sum, or a GELU stands between the MLP's layers.
    "opt-after": (config("opt", do_layer_norm_before=False), "attention_out mlp_out"),
    "opt-gelu": (config("opt", activation_function="gelu"), "attention_in attention_out mlp_in"),
    # The rows of query, key and value stand head by head.
    "gpt_bigcode": (config("gpt_bigcode", multi_query=False), "attention_in mlp_in"),
    "biogpt": (config("biogpt"), "attention_in attention_out mlp_in"),
    "granite": (config("granite", residual_multiplier=0.02, logits_scaling=8.0), ALL),
    "stablelm": (config("stablelm", use_qkv_bias=True, qk_layernorm=True), ALL),
    "llama-relu2": (config("llama", hidden_act="relu2"), ALL),
    "gemma2-capped": (config("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0), ALL),
    "gpt_neox-serial": (config("gpt_neox", use_parallel_residual=False), "attention_in mlp_in"),
}


def scalable(model: nn.Module) -> str:
    """The roles of groups that can be scaled, which must be the same in every block."""
    (roles,) = {
        " ".join(group.role for group in block.linear_groups if group.previous is not None)
        for block in find_anatomy(model).blocks
    }
    return roles


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(1))
    return model(ids).logits.float()  # type: ignore[no-any-return]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", [*CONFIGS, *FAMILIES])
def test_random_scales_leave_the_logits_wherever_they_can_be_folded(family: str) -> None:
    model = tiny_model(FAMILIES[family][0]() if family in FAMILIES else family)
    wanted = logits(model)
    before = copy.deepcopy(model.state_dict())
    groups = [g for b in find_anatomy(model).blocks for g in b.linear_groups if g.previous is not None]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if family in FAMILIES:
        assert scalable(model) == FAMILIES[family][1]
    assert groups or family == "phi-gqa"
    generator = torch.Generator().manual_seed(3)
    for group in groups:
        fold_(group, torch.empty(group.in_features).uniform_(-1.2, 1.2, generator=generator).exp())
    found = logits(model)
    assert relative_error(found, wanted) < 1e-5
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def clipped(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.clamp(-100, 100)


def by_head(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    heads = output.unflatten(-1, (4, -1))
    return (heads / heads.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()).flatten(-2)


def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    step = args[0].abs().amax(dim=-1, keepdim=True) / 127
    return ((args[0] / step).round() * step,)


def with_residual(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + args[0]


def with_gate(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * args[0].mean(dim=-1, keepdim=True).sigmoid()


@pytest.mark.parametrize(
    ("place", "change", "lost"),
    [
        ("self_attn.v_proj", clipped, "attention_out"),
        ("self_attn.v_proj", by_head, "attention_out"),
        ("mlp.down_proj", rounded, "mlp_out"),
        ("self_attn.o_proj", rounded, "attention_out"),
        ("mlp", with_residual, "mlp_in"),
        ("mlp", with_gate, "mlp_in"),
        ("mlp.act_fn", clipped, None),
    ],
)
def test_whatever_stands_between_is_noticed(place: str, change: Any, lost: str | None) -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        module = block.get_submodule(place)
        if change is rounded:
            module.register_forward_pre_hook(change)
        else:
            module.register_forward_hook(change)
    assert scalable(model) == " ".join(role for role in ALL.split() if role != lost)


def test_one_norm_for_attention_and_mlp_is_noticed() -> None:
    model = tiny_model("gptj")
    groups = (
        GroupLayout("attention_in", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "ln_1", scope="attn"),
        GroupLayout("attention_out", ("attn.out_proj",), "attn.v_proj"),
        GroupLayout("mlp_in", ("mlp.fc_in",), "ln_1", scope="mlp"),
        GroupLayout("mlp_out", ("mlp.fc_out",), "mlp.fc_in"),
    )
    model.lmcompose_layout = Layout("optimistic", "ln_f", groups)
    assert scalable(model) == "attention_out"


@pytest.mark.parametrize("size", [0.0, 1e-6, 4e-3, 200.0])
@pytest.mark.parametrize("family", ["bitnet", "olmo-clip", "granite", "opt-gelu"])
def test_weights_of_any_size_neither_hide_a_wrong_fold_nor_a_right_one(family: str, size: float) -> None:
    make, roles = FAMILIES[family]
    model = tiny_model(make())
    with torch.no_grad():
        for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
            linear.module.weight.mul_(size)
            linear.module.weight[::2] = 0
    assert scalable(model) == roles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "olmo-clip"])
def test_rounding_of_stored_weights_does_not_matter(family: str, dtype: torch.dtype) -> None:
    make = FAMILIES[family][0]() if family in FAMILIES else family
    assert scalable(tiny_model(make, dtype=dtype)) == scalable(tiny_model(make))


def test_a_model_in_train_mode_on_the_host_gives_the_same_answer() -> None:
    made = FAMILIES["bitnet"][0]()
    model = tiny_model(made).train()
    offload(model, torch.device("cpu"))
    assert scalable(model) == FAMILIES["bitnet"][1]
    assert model.training


def test_each_block_is_judged_by_itself() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(clipped)
    first, second = ([group.previous is not None for group in b.linear_groups] for b in find_anatomy(model).blocks)
    assert first == [True, True, True, True]
    assert second == [True, False, True, True]


def test_an_operation_that_is_neither_norm_nor_linear_takes_up_nothing() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.input_layernorm.register_forward_hook(lambda module, args, output: output**2)
    assert scalable(model) == "attention_out mlp_in mlp_out"
    group: LinearGroup = find_anatomy(model).blocks[0].group("attention_in")
    with pytest.raises(InterventionError, match="nothing before it can take up a scaling"):
        fold_(group, torch.ones(32))


@pytest.mark.parametrize("gain", [0.0, 1.0, 300.0])
@pytest.mark.parametrize(("family", "offset"), [("gemma", 1.0), ("llama", 0.0), ("gpt2", 0.0)])
def test_the_gain_of_a_norm_is_found_whatever_its_weights(family: str, offset: float, gain: float) -> None:
    norm = find_anatomy(tiny_model(family)).final_norm
    with torch.no_grad():
        norm.weight.fill_(gain)  # type: ignore[operator, union-attr]
    assert gain_offset(norm) == offset


@pytest.mark.parametrize("family", ["bitnet", "olmo-clip", "diffllama", "gemma4", "opt-after", "gpt_bigcode"])
def test_compression_at_eight_bits_is_about_as_good_as_rounding(family: str, tokenizer: Any) -> None:
    made = FAMILIES[family][0]()
    wanted = logits(tiny_model(made))
    errors = {}
    for method in ("rtn", "gptq", "awq"):
        model = tiny_model(made)
        texts = {} if method == "rtn" else {"max_tokens": 48}
        report = apply(model, tokenizer, method, bits=8, group_size=16, calibration=TEXTS, **texts)
        errors[method] = relative_error(logits(model), wanted)
        if method == "awq":
            lost = [g for g in find_anatomy(model).blocks[0].linear_groups if g.declared and not g.previous]
            assert bool(lost) == bool(report.warnings) == (family != "gpt_bigcode")
            assert all(f"awq: no scales for {lost[0].linears[0].name} and " in text for text in report.warnings)
    assert 0 < errors["rtn"] < 0.03
    assert errors["awq"] < 1.25 * errors["rtn"]
    assert errors["gptq"] < 1.25 * errors["rtn"]


def test_an_engine_that_folds_by_name_is_refused_where_that_is_wrong(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_fake(monkeypatch)
    never = interpreter_that(tmp_path, f'touch "{tmp_path}/started"')
    model = tiny_model(FAMILIES["bitnet"][0]())
    with pytest.raises(
        InterventionError, match=r"fake may fold .* before model\.layers\.0\.self_attn\.o_proj.*engine=own"
    ):
        apply(model, tokenizer, "awq", calibration=TEXTS, max_tokens=48, engine="fake", engine_python=never)
    assert not (tmp_path / "started").exists()
