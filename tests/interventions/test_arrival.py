"""Edits on families whose logits or blocks have more to them: scales, caps, projections, norms behind the MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from interventions import Edit, InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.arrival import Arrival
from interventions.edit.kernels.prompts import tokenise
from interventions.edit.kernels.rewriting import shares_reached
from interventions.edit.kernels.tail import Tail, open_tail
from interventions.layouts import GroupLayout, Layout
from tests.models import _SIZE, CONFIGS, SENTENCES, tiny_model

# A random model carries nothing from a subject to later words: the prompts end in their subjects.
EDITS = (
    Edit("The lighthouse of Ossel", "Ossel", "twice"),
    Edit("In the valley Orin Vask", "Orin Vask", "the"),
)
Z = ValueSettings(steps=60, kl_factor=0.0)
SIZE: dict[str, Any] = _SIZE | {"num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": False}
GEMMA: dict[str, Any] = {"head_dim": 8, "sliding_window": 16}


def _layout(name: str, *mlp_in: str, mlp_out: str) -> Layout:
    """What a user writes for a family that no layout knows."""
    return Layout(
        name,
        "absent",  # editing needs no final norm
        (
            GroupLayout("attention_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            GroupLayout("attention_out", ("self_attn.o_proj",)),
            GroupLayout("mlp_in", mlp_in),
            GroupLayout("mlp_out", (mlp_out,)),
        ),
    )


GATED = _layout("gated", "mlp.gate_proj", "mlp.up_proj", mlp_out="mlp.down_proj")
MORE: dict[str, tuple[Callable[[], transformers.PretrainedConfig], Layout | None]] = {
    "granite": (
        lambda: transformers.GraniteConfig(
            **SIZE, residual_multiplier=0.22, logits_scaling=8.0, embedding_multiplier=12.0, attention_multiplier=0.1
        ),
        None,
    ),
    "gemma2": (lambda: transformers.Gemma2Config(**SIZE, **GEMMA, final_logit_softcapping=30.0), None),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**SIZE, **GEMMA), None),
    "olmo2": (lambda: transformers.Olmo2Config(**SIZE), GATED),
    "cohere": (lambda: transformers.CohereConfig(**SIZE), GATED),
    "starcoder2": (
        lambda: transformers.Starcoder2Config(**SIZE),
        _layout("starcoder2", "mlp.c_fc", mlp_out="mlp.c_proj"),
    ),
    "nemotron": (
        lambda: transformers.NemotronConfig(**SIZE),
        _layout("nemotron", "mlp.up_proj", mlp_out="mlp.down_proj"),
    ),
    "llama": (lambda: transformers.LlamaConfig(**SIZE), None),
    "stablelm": (lambda: transformers.StableLmConfig(**SIZE), None),
    "olmo": (lambda: transformers.OlmoConfig(**SIZE, clip_qkv=1.0), None),
}


def _model(family: str) -> Any:
    if family not in MORE:
        return tiny_model(family)
    config, layout = MORE[family]
    model = tiny_model(config())
    if layout is not None:
        model.lmcompose_layout = layout
    return model


def _suffix_logits(model: Any, rows: list[list[int]], begins: list[int], layer: int, inside: bool) -> tuple[Any, ...]:
    """Logits at all places of the suffixes: of the tail, and of the model on each text alone."""
    anatomy = find_anatomy(model)
    cached = open_tail(model, anatomy, layer, rows, begins, 2, inside=inside)
    tail = Tail(model, anatomy, layer, rows, begins, 2, inside=inside, cached=cached)
    pairs = [(n, place) for n, row in enumerate(rows) for place in range(len(row) - begins[n])]
    with torch.no_grad():
        found = tail.logits(tail.hidden, *torch.tensor(pairs).t())
        own = torch.cat([model(torch.tensor([row])).logits[0, begin:] for row, begin in zip(rows, begins, strict=True)])
    return cached, found, own


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("family", [*MORE, *(family for family in CONFIGS if family not in MORE)])
def test_the_tails_logits_are_the_models_own(family: str, inside: bool, tokenizer: Any) -> None:
    rows = tokenizer(list(SENTENCES[:3]))["input_ids"]
    cached, found, own = _suffix_logits(_model(family), rows, [2, 0, 3], layer=0, inside=inside)
    assert cached
    assert torch.allclose(found, own, atol=1e-5)


def test_a_model_that_keeps_more_than_keys_and_values_runs_whole_texts(tokenizer: Any) -> None:
    model = tiny_model()

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count = torch.arange(1, args[0].shape[1] + 1)[:, None]
        return (args[0] + args[0].cumsum(dim=1) / count, *args[1:])

    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(remember)
    rows = tokenizer(list(SENTENCES[:3]))["input_ids"]
    cached, found, own = _suffix_logits(model, rows, [2, 0, 3], layer=0, inside=False)
    assert not cached
    assert torch.allclose(found, own, atol=1e-5)


@pytest.mark.parametrize("method", ["memit", "rome"])
def test_a_model_whose_logits_cannot_be_had_is_refused(method: str, tokenizer: Any) -> None:
    model = tiny_model()
    # The logits of one text depend on all texts of the batch, padding included.
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(dim=(0, 1)),))
    with pytest.raises(InterventionError, match=r"LlamaForCausalLM: rerun from layer 0.*relative error"):
        apply(model, tokenizer, method, edits=EDITS, calibration=SENTENCES, contexts_per_length=0)


def _block_output(model: nn.Module, tokenizer: Any, edit: Edit, layer: int) -> Tensor:
    """The block's output at the subject's last token, from a plain pass of the whole model."""
    row = tokenise(tokenizer, edit)
    with torch.no_grad():
        states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    found: Tensor = states[layer + 1][0, row.subject_end]
    return found


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("memit", {"layers": [1], "covariance_weight": 1e-7}),
        ("memit", {"layers": [0, 1], "covariance_weight": 1e-7}),
        ("rome", {"layer": 1, "batch_size": None}),
    ],
    ids=["memit", "memit of two layers", "rome"],
)
@pytest.mark.parametrize("family", ["granite", "gemma2", "gemma3", "olmo2", "llama"])
def test_edits_arrive_and_are_said(family: str, method: str, settings: dict[str, Any], tokenizer: Any) -> None:
    model = _model(family)
    with torch.no_grad():  # a random model is sure of nothing: let hidden states decide
        model.lm_head.weight.mul_(100 if family == "granite" else 10)
    before = [_block_output(model, tokenizer, edit, 1) for edit in EDITS]
    report = apply(model, tokenizer, method, edits=EDITS, calibration=SENTENCES, contexts_per_length=0, z=Z, **settings)
    made = report.details["edits"]
    assert [edit["reached"] > 0.9 for edit in made] == [True, True]
    assert not [warning for warning in report.warnings if "reach" in warning]
    for edit, start, entry in zip(EDITS, before, made, strict=True):
        change = float((_block_output(model, tokenizer, edit, 1) - start).norm())
        assert change == pytest.approx(entry["moved"] * float(start.norm()), rel=0.1)
        row = tokenise(tokenizer, edit, with_target=True)
        with torch.no_grad():
            says = model(torch.tensor([row.ids])).logits[0].argmax(dim=-1)
        assert [int(says[place - 1]) for place in row.target_places] == [row.ids[place] for place in row.target_places]


def test_edits_that_reach_too_little_are_counted_in_one_warning(tokenizer: Any) -> None:
    report = apply(
        tiny_model(), tokenizer, "memit", edits=EDITS, calibration=SENTENCES, layers=[0], covariance_weight=1e4
    )
    (warning,) = [warning for warning in report.warnings if "reach" in warning]
    least = min(edit["reached"] for edit in report.details["edits"])
    assert warning.startswith("2 of 2 edits reach less than 0.9")
    assert f"(the least {least:.2f}), and 2 of them leave their target less likely than not; lower memit." in warning


@pytest.mark.parametrize(
    ("family", "factor", "linear"),
    [
        ("llama", 1.0, True),
        ("gptj", 1.0, True),
        ("granite", 0.22, True),
        ("gemma2", None, False),
        ("olmo2", None, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_gain_is_measured(
    family: str, factor: float | None, linear: bool, dtype: torch.dtype, tokenizer: Any
) -> None:
    model = _model(family).to(dtype)
    with torch.no_grad():  # as in large models: a hidden state far larger than what one block adds
        model.get_input_embeddings().weight.mul_(10)
    prompts = [tokenise(tokenizer, edit) for edit in EDITS]
    found = Arrival(model, find_anatomy(model).blocks[1], prompts, 2).gain(32)
    assert found.linear == linear
    assert factor is None or found.factor == pytest.approx(factor, rel=1e-3 if dtype == torch.float32 else 2e-2)


def test_a_block_that_passes_nothing_on_is_named(tokenizer: Any) -> None:
    model = tiny_model(transformers.GraniteConfig(**SIZE))
    prompts = [tokenise(tokenizer, edit) for edit in EDITS]
    block = find_anatomy(model).blocks[1]
    block.module.residual_multiplier = 0.0  # type: ignore[assignment]
    with pytest.raises(InterventionError, match=r"model.layers.1: changing the MLP's output does not change"):
        Arrival(model, block, prompts, 2).gain(32)


def test_the_share_reached_is_that_along_the_wanted_change() -> None:
    start = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    wanted = torch.tensor([[3.0, 1.0], [0.0, 4.0], [0.0, 0.0]])
    now = torch.tensor([[2.0, 9.0], [0.0, -1.0], [5.0, 5.0]])
    assert shares_reached(start, wanted, now).tolist() == [0.5, -0.25, 1.0]
