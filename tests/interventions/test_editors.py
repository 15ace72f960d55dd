"""What holds for every editing method: on every architecture, tokenizer and dtype, and for bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn

from interventions import Edit, InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.prompts import tokenise
from interventions.edit.pmet import PmetValueSettings
from tests.models import CONFIGS, SENTENCES, tiny_model, tiny_tokenizer
from tests.tokenizers import TOKENIZERS

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
)
FAST = {"contexts_per_length": 0, "z": ValueSettings(steps=3)}
METHODS: dict[str, dict[str, Any]] = {
    "ft": {"layers": [1], "steps": 2, "lr": 1e-3},
    "lora": {"layers": [1], "targets": ["value", "mlp_out"], "steps": 4, "lr": 1e-2},
    "memit": {"layers": [0, 1], **FAST},
    "rome": {"layer": 1, **FAST},
    "emmet": {"layers": [0, 1], **FAST},
    "pmet": {"layers": [0, 1], "contexts_per_length": 0, "z": PmetValueSettings(steps=3)},
    "alphaedit": {"layers": [0, 1], "nullspace_threshold": 0.5, "nullspace_relative": True, **FAST},
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _named(method: str, model: nn.Module) -> set[str]:
    """The weights that the settings above name."""
    blocks = find_anatomy(model).blocks
    chosen = {0: ["memit", "emmet", "pmet", "alphaedit"], 1: list(METHODS)}
    names = {block.mlp_output.parameter_name for block in blocks if method in chosen[block.index]}
    if method == "lora":
        names.add(blocks[1].group("attention_in").linears[-1].parameter_name)
    return names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_on_every_architecture_only_the_weights_named_change(family: str, method: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)
    before = _traces(model)
    state = torch.get_rng_state()
    report = apply(model, tokenizer, method, edits=EDITS, calibration=SENTENCES, **METHODS[method])
    assert set(report.changed) == _named(method, model)
    assert _traces(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [edit["target"] for edit in report.details["edits"]] == ["Dunmere", "silver river"]


def _traces(model: nn.Module) -> Any:
    """Everything but values that a method could leave changed."""
    return (
        sorted(vars(model)),
        [(name, type(module), module.training, *module._forward_hooks) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        model.config.to_dict(),
    )


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_weights_keep_their_dtype(method: str, tokenizer: Any) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    settings = METHODS[method] | ({"lr": 1e-2} if method == "ft" else {})
    report = apply(model, tokenizer, method, edits=EDITS, calibration=SENTENCES, **settings)
    assert set(report.changed) == _named(method, model)


def _tokenizer(bos: bool, eos: bool, side: str) -> Any:
    tokenizer = tiny_tokenizer()
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.padding_side = side
    return tokenizer


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_subject_and_target_are_found_whatever_special_tokens_there_are(bos: bool, eos: bool) -> None:
    tokenizer = _tokenizer(bos, eos, "left")
    for edit in (*EDITS, Edit("Ossel", "Ossel", "fern")):
        row = tokenise(tokenizer, edit, with_target=True)
        assert (row.ids[0] == 0) is bos
        assert tokenizer.decode(row.ids[: row.subject_end + 1], skip_special_tokens=True).endswith(edit.subject)
        assert tokenizer.decode(row.ids[-row.target_length :]) == f" {edit.target}"


@pytest.mark.parametrize("method", METHODS)
def test_padding_side_and_a_missing_bos_do_not_matter_to_the_method(method: str) -> None:
    weights = []
    for side in ("left", "right"):
        model, tokenizer = tiny_model(), _tokenizer(False, False, side)
        report = apply(model, tokenizer, method, edits=EDITS, calibration=SENTENCES, **METHODS[method])
        weights.append(model.get_parameter(report.changed[0]))
        assert tokenizer.padding_side == side
    assert torch.equal(*weights)


@pytest.mark.parametrize(("prompt", "target"), [("Mira plays the", "lute "), ("Mira plays the", " lute")])
def test_spaces_around_a_target_do_not_matter(prompt: str, target: str, tokenizer: Any) -> None:
    row = tokenise(tokenizer, Edit(prompt, "Mira", target), with_target=True)
    assert row == tokenise(tokenizer, Edit(prompt, "Mira", "lute"), with_target=True)
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == "Mira plays the lute"


def test_a_prompt_that_ends_in_a_space_gets_no_second_one(tokenizer: Any) -> None:
    row = tokenise(tokenizer, Edit("Mira plays the ", "Mira", "lute"), with_target=True)
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == "Mira plays the lute"
    assert tokenizer.decode(row.ids[-row.target_length :]) == " lute"


def test_a_chat_template_frames_prompt_and_target() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    row = tokenise(tokenizer, EDITS[1], "Bread. ", with_target=True, chat_template=True)
    text = tokenizer.decode(row.ids)
    assert text == "<s>user: Bread. In the valley Orin Vask is a\nassistant: silver river"
    assert tokenizer.decode(row.ids[: row.subject_end + 1]).endswith("Orin Vask")
    assert tokenizer.decode(row.ids[-row.target_length :]).strip() == "silver river"


@pytest.mark.parametrize("method", METHODS)
def test_a_chat_template_is_used_on_request(method: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    weights = []
    for chat in (True, False):
        model = tiny_model()
        report = apply(
            model, tokenizer, method, edits=EDITS, calibration=SENTENCES, chat_template=chat, **METHODS[method]
        )
        weights.append(model.get_parameter(report.changed[0]))
    assert not torch.equal(*weights)
    with pytest.raises(InterventionError, match="no chat template"):
        apply(tiny_model(), tiny_tokenizer(), method, edits=EDITS, calibration=SENTENCES, chat_template=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_subject_that_ends_in_a_token_of_the_target_is_refused_where_its_place_matters(method: str) -> None:
    tokenizer = TOKENIZERS["across words"]()
    edit = Edit("Mira Tolvan", "Mira Tolvan", "Karth")
    assert tokenise(tokenizer, edit, with_target=True).target_length == 1  # "n Karth"
    if method in ("ft", "lora"):
        assert apply(tiny_model(), tokenizer, method, edits=[edit], **METHODS[method]).changed
    else:
        _refused(method, (edit,), "the tokenizer ends the subject 'Mira Tolvan' in a token of the target", tokenizer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Edit("Orin Vask is a", "Mira", "fern"), "edit 1.*'Mira' is not in its prompt"),
        (Edit("Orin Vask is a", "Orin Vask", " "), "edit 1.*target is empty"),
        (Edit("Orin Vask is a", "", "fern"), "edit 1.*subject is empty"),
    ],
)
def test_a_bad_edit_is_named(method: str, bad: Edit, message: str, tokenizer: Any) -> None:
    _refused(method, (EDITS[0], bad), message, tokenizer)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("ft", {"layers": [2]}, r"ft.layers=\[2\].*0 to 1"),
        ("ft", {"layers": []}, r"ft.layers=\[\]"),
        ("ft", {"lr": 0.0}, "ft.lr=0.0"),
        ("ft", {"norm_constraint": 0.0}, "ft.norm_constraint"),
        ("ft", {"lr": 1e4}, r"ft: the training of layers \[1\] with ft.lr=10000.0 diverged.*down_proj.*lower ft.lr"),
        ("lora", {"lr": 1e3}, r"lora: the training of layers \[1\] with lora.lr=1000.0 diverged.*lower lora.lr"),
        ("lora", {"layers": [-1]}, r"lora.layers=\[-1\].*from 0 up"),
        ("lora", {"targets": ["up_proj"]}, "lora.targets=\\['up_proj'\\].*mlp_in"),
        ("lora", {"targets": []}, "lora.targets"),
        ("lora", {"rank": 12}, "lora.initial_rank=12: expected more than rank=12"),
        ("lora", {"final": 0.95}, "lora.steps=4: .*final=0.95"),
        ("lora", {"lr": 1e30}, r"lora: the loss of edit 0 .*lora.lr=1e\+30; lower lora.lr"),
        ("rome", {"layer": 2}, "rome.layer=2.*0 to 1"),
        ("rome", {"layer": None, "layer_fraction": 1.5}, "rome.layer_fraction=1.5"),
        ("rome", {"batch_size": -1}, "rome.batch_size=-1"),
        ("alphaedit", {"layers": [0, 7]}, r"alphaedit.layers=\[0, 7\].*0 to 1"),
        ("alphaedit", {"ridge": 0.0}, "alphaedit.ridge=0.0"),
        ("alphaedit", {"nullspace_threshold": 1e-9}, r"alphaedit: .*down_proj.weight.*raise nullspace_threshold"),
    ],
)
def test_a_bad_setting_is_named(method: str, overrides: dict[str, Any], message: str, tokenizer: Any) -> None:
    _refused(method, EDITS, message, tokenizer, **METHODS[method] | overrides)


def _refused(method: str, edits: tuple[Edit, ...], message: str, tokenizer: Any, **settings: Any) -> None:
    model = tiny_model()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before = _traces(model)
    with pytest.raises(InterventionError, match=message):
        apply(model, tokenizer, method, edits=edits, calibration=SENTENCES, **settings)
    assert _traces(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
