"""MEMIT on tiny random models: its parts against plain reformulations, its promises, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import Edit, InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.memory import EditedMemory
from interventions.edit.kernels.prompts import sample_contexts, tokenise
from interventions.edit.kernels.subjects import keys_and_values
from interventions.edit.kernels.tail import Tail
from interventions.edit.kernels.target_values import optimise_values
from interventions.edit.memit import MemitSettings
from interventions.structure import chosen_layers
from tests.models import SENTENCES, tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)
CONTEXTS = ["", "Bread and salt. ", "She read the letter twice and. "]
FAMILIES = ["llama-gqa", "gpt_neox", "gptj", "opt", "gpt2", "phi3", "gemma2", "qwen3"]


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_the_subject_ends_where_its_last_character_does(tokenizer: Any) -> None:
    for edit in EDITS:
        for context in CONTEXTS:
            row = tokenise(tokenizer, edit, context, with_target=True)
            upto = tokenizer.decode(row.ids[: row.subject_end + 1], skip_special_tokens=True)
            assert upto.endswith(edit.subject)
            assert tokenizer.decode(row.ids[-row.target_length :]).strip() == edit.target
            assert tokenizer.decode(row.ids, skip_special_tokens=True) == f"{context}{edit.prompt} {edit.target}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_continues_what_the_whole_model_computes(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    rows = tokenizer(list(SENTENCES[:3]))["input_ids"]
    begins = [2, 0, 3]
    tail = Tail(model, anatomy, 0, rows, begins, tokenizer.pad_token_id)
    places = torch.tensor([3, 4, 3])
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0, place] for row, place in zip(rows, places, strict=True)]
        whole = torch.stack(alone)
        above = [
            tail.logits(tail.hidden, torch.arange(3), places - torch.tensor(begins))
            for _ in range(2)  # again and again: nothing may pile up
        ][-1]
    assert torch.allclose(whole, above, atol=1e-4)


def _plain_value(model: nn.Module, tokenizer: Any, edit: Edit, layer: int, settings: ValueSettings) -> Tensor:
    """One edit at a time, one text at a time, through the whole model: as the paper tells it."""
    block = find_anatomy(model).blocks[layer].module
    prompts = [context + edit.prompt for context in CONTEXTS]
    state: dict[str, Any] = {"delta": None, "place": 0, "seen": None}

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        state["seen"] = hidden[0, state["place"]].detach().clone()
        if state["delta"] is None:
            return None
        changed = hidden.clone()
        changed[0, state["place"]] += state["delta"]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def place_of(text: str, context: str) -> int:
        end = len(context) + text[len(context) :].index(edit.subject) + len(edit.subject)
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return max(n for n, (start, stop) in enumerate(offsets) if start < end and stop > start)

    def log_p(text: str, place: int) -> Tensor:
        state["place"] = place
        return model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(dim=-1)

    essence = f"{edit.subject} is a"
    essence_place = place_of(essence, "")
    handle = block.register_forward_hook(add)
    try:
        with torch.no_grad():
            said = log_p(essence, essence_place)[essence_place]
            log_p(prompts[0], place_of(prompts[0], ""))
            start = state["seen"]
        delta = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=settings.lr)
        for step in range(settings.steps):
            state["delta"] = delta
            losses = []
            for context, prompt in zip(CONTEXTS, prompts, strict=True):
                text = f"{prompt} {edit.target}"
                ids = tokenizer(text)["input_ids"]
                first = len(tokenizer(prompt)["input_ids"])
                says = log_p(text, place_of(text, context))
                losses.append(-torch.stack([says[p - 1, ids[p]] for p in range(first, len(ids))]).mean())
            now = log_p(essence, essence_place)[essence_place]
            divergence = torch.nn.functional.kl_div(now, said, log_target=True, reduction="sum")
            decay = settings.weight_decay * delta.norm() / start.norm() ** 2
            loss = torch.stack(losses).mean() + settings.kl_factor * divergence + decay
            if loss < settings.stop_loss or step == settings.steps - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if delta.norm() > settings.clamp_norm_factor * start.norm():
                    delta *= settings.clamp_norm_factor * start.norm() / delta.norm()
    finally:
        handle.remove()
    return start + delta.detach()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        ValueSettings(steps=8),
        ValueSettings(steps=6, lr=0.05, clamp_norm_factor=0.2, kl_factor=2.0, stop_loss=3.0),
    ],
    ids=["published", "clamped"],
)
def test_values_of_a_batch_are_those_of_one_edit_at_a_time(
    family: str, settings: ValueSettings, tokenizer: Any
) -> None:
    model = tiny_model(family)
    batch = optimise_values(model, tokenizer, find_anatomy(model), EDITS, CONTEXTS, 0, settings, lambda line: None)
    for number, edit in enumerate(EDITS):
        alone = _plain_value(model, tokenizer, edit, 0, settings)
        assert torch.allclose(batch.z[number], alone, rtol=1e-3, atol=1e-3 * float(alone.norm()))


def test_an_edit_that_has_arrived_stays_and_the_others_go_on(tokenizer: Any) -> None:
    model = tiny_model()
    anatomy = find_anatomy(model)
    few = optimise_values(
        model, tokenizer, anatomy, EDITS, CONTEXTS, 0, ValueSettings(25, stop_loss=4.5), lambda line: None
    )
    assert int(few.steps.min()) < int(few.steps.max())
    assert bool((few.loss[few.steps < 24] < 4.5).all())


def test_keys_average_the_bare_prompt_with_all_contexts_together(tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    anatomy = find_anatomy(model)
    keys, values = keys_and_values(model, tokenizer, anatomy, EDITS, CONTEXTS, 1)
    for number, edit in enumerate(EDITS):
        seen = []
        handle = anatomy.blocks[1].mlp_output.module.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0][0]))
        for context in CONTEXTS:
            row = tokenise(tokenizer, edit, context)
            with torch.no_grad():
                model(input_ids=torch.tensor([row.ids]))
            seen[-1] = seen[-1][row.subject_end]
        handle.remove()
        expected = 0.5 * seen[0] + 0.5 * torch.stack(seen[1:]).mean(dim=0)
        assert torch.allclose(keys[number], expected, atol=1e-5)
    assert values.shape == (len(EDITS), model.config.n_embd)


# Gemma 2 norms the MLP's output before adding it, so no update of the projection alone yields z there.
@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f != "gemma2"), "llama-odd", "llama-bias"])
def test_memit_brings_the_subjects_to_their_values_and_changes_only_the_weights_it_names(
    family: str, tokenizer: Any
) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS, [""], 0, ValueSettings(), lambda line: None)
    before = _target_log_p(model, tokenizer)
    tokenizer.padding_side = "left"
    flags = [p.requires_grad for p in model.parameters()], model.training, model.config.use_cache
    report = apply(
        model,
        tokenizer,
        "memit",
        edits=EDITS,
        calibration=SENTENCES,
        layers=[0],
        contexts_per_length=0,
        covariance_weight=1e-7,
    )
    assert report.changed == (anatomy.blocks[0].mlp_output.parameter_name,)
    _, reached = keys_and_values(model, tokenizer, anatomy, EDITS, [""], 0)
    assert float((reached - wanted.z).norm()) < 0.01 * float(wanted.z.norm())
    assert _target_log_p(model, tokenizer) > before
    assert ([p.requires_grad for p in model.parameters()], model.training, model.config.use_cache) == flags
    assert tokenizer.padding_side == "left"
    assert [edit["target"] for edit in report.details["edits"]] == [edit.target for edit in EDITS]


def _target_log_p(model: nn.Module, tokenizer: Any) -> float:
    """Mean log-probability of the edits' target tokens."""
    total = []
    for edit in EDITS:
        row = tokenise(tokenizer, edit, with_target=True)
        with torch.no_grad():
            says = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(dim=-1)
        total += [float(says[p - 1, row.ids[p]]) for p in range(len(row.ids) - row.target_length, len(row.ids))]
    return sum(total) / len(total)


def test_the_same_seed_gives_the_same_weights_and_another_seed_other_contexts(tokenizer: Any) -> None:
    models = [tiny_model() for _ in range(3)]
    reports = [
        apply(m, tokenizer, "memit", edits=EDITS, calibration=SENTENCES, layers=[0, 1], seed=seed)
        for m, seed in zip(models, (1, 1, 2), strict=True)
    ]
    name = reports[0].changed[0]
    assert torch.equal(models[0].get_parameter(name), models[1].get_parameter(name))
    assert reports[0].details["contexts"] != reports[2].details["contexts"]


def test_contexts_leave_the_global_random_numbers_alone(tokenizer: Any) -> None:
    state = torch.get_rng_state()
    sample_contexts(tiny_model(), tokenizer, [3], 5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_default_to_fractions_of_depth() -> None:
    def chosen(settings: MemitSettings, depth: int) -> list[int]:
        return chosen_layers("memit", settings.layers, settings.layer_fractions, depth)

    assert chosen(MemitSettings(), 32) == [4, 5, 6, 7, 8]  # as published for 32 blocks
    assert chosen(MemitSettings(), 8) == [1, 2]
    assert chosen(MemitSettings(), 2) == [0]
    assert chosen(MemitSettings(layers=[1, 3]), 8) == [1, 3]


@pytest.mark.parametrize(
    ("edits", "overrides", "message"),
    [
        ((), {}, "no edits"),
        ((Edit("Orin Vask is a", "Mira", "fern"),), {}, "edit 0.*'Mira' is not in its prompt"),
        ((EDITS[0], Edit("Orin Vask is a", "Orin Vask", " ")), {}, "edit 1.*target is empty"),
        (EDITS, {"layers": [0, 2]}, r"memit.layers=\[0, 2\].*0 to 1"),
        (EDITS, {"layer_fractions": [0.5, 0.1]}, "layer_fractions"),
        (EDITS, {"batch_size": 0}, "memit.batch_size=0"),
        (EDITS, {"chat_template": True}, "chat_template"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(
    edits: tuple[Edit, ...], overrides: dict[str, Any], message: str, tokenizer: Any
) -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(InterventionError, match=message):
        apply(model, tokenizer, "memit", edits=edits, calibration=SENTENCES, **overrides)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_that_is_not_finite_names_the_edit_and_the_rate(tokenizer: Any) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(InterventionError, match=r"edit 0 .*lower z\.lr, or look for NaN"):
        apply(model, tokenizer, "memit", edits=EDITS, calibration=SENTENCES, layers=[0], contexts_per_length=0)


def test_calibration_text_is_needed(tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match="calibration text"):
        apply(tiny_model(), tokenizer, "memit", edits=EDITS)


def test_a_dead_key_is_solved_with_a_ridge_and_reported(tokenizer: Any) -> None:
    model = tiny_model()
    mlp = find_anatomy(model).blocks[0].module.mlp
    with torch.no_grad():
        mlp.gate_proj.weight[5] = 0
    report = apply(model, tokenizer, "memit", edits=EDITS, calibration=SENTENCES, layers=[0])
    assert any("ridge" in warning for warning in report.warnings)


def test_edits_of_one_subject_share_the_change_of_its_hidden_state(tokenizer: Any) -> None:
    model = tiny_model()
    edits = (*EDITS, Edit("Mira Tolvan plays the", "Mira Tolvan", "horn"))
    settings = ValueSettings(steps=6, stop_loss=0.0)
    found = optimise_values(model, tokenizer, find_anatomy(model), edits, [""], 0, settings, lambda line: None)
    start = keys_and_values(model, tokenizer, find_anatomy(model), edits, [""], 0).values
    changes = found.z - start
    assert torch.allclose(changes[0], changes[3], atol=1e-5)
    alone = optimise_values(model, tokenizer, find_anatomy(model), edits[:3], [""], 0, settings, lambda line: None)
    assert torch.allclose(found.z[1:3], alone.z[1:], atol=1e-4)  # the others do not notice
    assert not torch.allclose(found.z[0], alone.z[0], atol=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_follow_one_another_on_what_the_model_has_become(batch_size: int, tokenizer: Any) -> None:
    settings = {"layers": [0], "contexts_per_length": 0, "covariance_weight": 1e-7, "z": ValueSettings(steps=5)}
    together, apart = tiny_model(), tiny_model()
    report = apply(together, tokenizer, "memit", edits=EDITS, calibration=SENTENCES, batch_size=batch_size, **settings)
    for start in range(0, len(EDITS), batch_size):
        some = EDITS[start : start + batch_size]
        apply(apart, tokenizer, "memit", edits=some, calibration=SENTENCES, **settings)
    (name,) = report.changed
    assert report.details["batches"] == -(-len(EDITS) // batch_size)
    assert torch.allclose(together.get_parameter(name), apart.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_however_many_batches_weights_are_rounded_once(tokenizer: Any) -> None:
    """An update too small for bfloat16 is not lost where many of them add up."""
    model = tiny_model(dtype=torch.bfloat16)
    memory = find_anatomy(model).blocks[0].memory
    (output,) = memory.linears
    before = output.weight.float()
    weight = EditedMemory(memory)
    step = before.abs().clamp_min(1e-3) * 1e-3  # less than half the distance between bfloat16 values
    for _ in range(20):
        weight.add_(step.double())
    assert torch.equal(output.weight, (before + 20 * step).bfloat16())
    change = float(20 * step.norm() / before.norm())
    assert weight.changes() == {output.parameter_name: pytest.approx(change, rel=1e-4)}
