"""Training tinyworld's model: a few real steps, a stop and a restart, and the mask that closes names."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from compositions.tinyworld import train as training
from compositions.tinyworld.review import every_statement, review_text, unsure
from compositions.tinyworld.text import templates, training_stream
from compositions.tinyworld.train import (
    TrainSettings,
    Window,
    batches,
    loss_with_closed_names,
    make_model,
    make_tokenizer,
    review,
    review_trained,
    train,
    windows,
)
from compositions.tinyworld.truth import World, make_world

SMALL = TrainSettings(
    vocabulary=700,
    hidden=32,
    mlp=48,
    layers=3,
    heads=4,
    kv_heads=2,
    initial_std=0.02,
    window=48,
    short_window=24,
    batch=4,
    epochs=1,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return make_tokenizer(world, SMALL)


@pytest.fixture(scope="module")
def packed(world: World, tokenizer: PreTrainedTokenizerFast) -> list[Window]:
    return list(windows(world, tokenizer, training_stream(world, random.Random(0), 1), SMALL.window))


def test_windows_begin_with_bos_and_mark_whole_names(
    world: World, tokenizer: PreTrainedTokenizerFast, packed: list[Window]
) -> None:
    known = {fact.subject for fact in world.facts}
    complete = 0
    for window in packed[:200]:
        assert len(window.ids) == len(window.names) == SMALL.window
        assert window.ids[0] == tokenizer.bos_token_id
        for number in sorted(set(window.names) - {0}):
            places = [place for place, name in enumerate(window.names) if name == number]
            assert places == list(range(places[0], places[-1] + 1))
            name = tokenizer.decode([window.ids[place] for place in places]).strip()
            if places[-1] < SMALL.window - 1:  # else the window may have cut it off
                assert name in known
                complete += 1
    assert complete > 200


def test_every_other_step_takes_short_windows_and_all_begin_with_a_sentence(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    sentences = list(training_stream(world, random.Random(0), 1))[:2000]
    made = batches(world, tokenizer, sentences, SMALL)
    shapes = [(len(batch), {len(window.ids) for window in batch}) for batch in made]
    assert set(map(str, shapes)) == {f"({SMALL.batch}, {{48}})", f"({2 * SMALL.batch}, {{24}})"}
    short = [shape[0] > SMALL.batch for shape in shapes]
    assert abs(sum(short) / len(short) - 0.5) < 0.1
    assert max(len(list(group)) for _, group in groupby(short)) <= 2
    text = [tokenizer.decode(window.ids[1:]).lstrip() for batch in made for window in batch]
    starts = {sentence[:12] for sentence in sentences}
    assert all(start[:12] in starts for start in text)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(SMALL, tokenizer)


def test_open_windows_train_the_plain_model(model: LlamaForCausalLM, packed: list[Window]) -> None:
    ids = torch.tensor([window.ids for window in packed[:3]])
    names = torch.tensor([window.names for window in packed[:3]])
    loss = loss_with_closed_names(model, ids, names, torch.zeros(3, dtype=torch.bool), 2)
    assert torch.allclose(loss, model(input_ids=ids, labels=ids).loss, atol=1e-5)


@pytest.mark.parametrize("closed_blocks", [2, 3])
def test_nothing_leaves_a_closed_name_before_the_open_blocks(
    model: LlamaForCausalLM, packed: list[Window], closed_blocks: int
) -> None:
    window = next(w for w in packed if w.names[5] and not w.names[-1])
    ids, names = torch.tensor([window.ids]), torch.tensor([window.names])
    place = next(p for p in reversed(range(SMALL.window)) if p and names[0, p])
    after = slice(place + 1, None)
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, out: seen.append(out)) for layer in model.model.layers]
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % SMALL.vocabulary
    for tokens in (ids, other):
        loss_with_closed_names(model, tokens, names, torch.ones(1, dtype=torch.bool), closed_blocks)
    for handle in handles:
        handle.remove()
    for number in range(SMALL.layers):
        first, second = seen[number][0], seen[SMALL.layers + number][0]
        assert not torch.equal(first[place], second[place])
        assert torch.equal(first[after], second[after]) == (number < closed_blocks)


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    settings = replace(SMALL, seed=3)
    whole = train(settings, tmp_path / "whole", steps=6, save_every=2)
    train(settings, tmp_path / "parts", steps=4, save_every=2)
    parts = train(settings, tmp_path / "parts", steps=6, save_every=2)
    assert parts == whole
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("whole", "parts")]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_and_saves_what_the_hub_code_loads(tmp_path: Path) -> None:
    summary = train(SMALL, tmp_path, steps=80)
    assert summary["loss"] < 6.2  # log 700 is 6.55
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True, dtype=torch.float32)
    ids = tokenizer("Mira Tolvan was born in", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert model(ids).logits.isfinite().all()
    assert not list(tmp_path.glob("*.bin"))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(SMALL, tmp_path, steps=2, save_every=1)
    with pytest.raises(ValueError, match="other settings"):
        train(replace(SMALL, batch=8), tmp_path, steps=2)


def test_what_is_held_out_is_never_reviewed(world: World) -> None:
    statements = every_statement(world)
    heldout = {template.text for fact in world.facts for template in templates(fact.relation) if template.heldout}
    assert heldout and not heldout & {statement.template.text for statement in statements}
    sentences = review_text(world, statements[::997], random.Random(0), times=2, others=3.0)
    assert len(sentences) == 2 * 2 * len(statements[::997]) * 4
    for statement in statements[::997]:
        sentence = statement.template.text.format(s=statement.fact.subject, o=statement.fact.object)
        assert sum(found.startswith(sentence) for found in sentences) >= 2


def test_review_teaches_what_the_model_does_not_know(
    monkeypatch: pytest.MonkeyPatch, world: World, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    some = every_statement(world)[::20000]
    monkeypatch.setattr(training, "every_statement", lambda world: some)
    assert len(unsure(model.eval(), tokenizer, some, 0.9)) == len(some)
    settings = replace(
        SMALL, review_certainties=(0.9,) * 3, review_times=120, review_others=0.0, review_rate=1e-2, closed_share=0.0
    )
    rounds = review(world, tokenizer, model, settings)
    left = len(unsure(model.eval(), tokenizer, some, 0.9))
    assert rounds[0]["unsure"] == rounds[0]["asked"] == len(some)
    assert left <= len(some) // 4


def test_a_trained_model_gets_the_rounds_of_review_that_it_has_not_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    train(SMALL, tmp_path, steps=2)
    some = every_statement(world)[::9000]
    monkeypatch.setattr(training, "every_statement", lambda world: some)
    for certainties, had, changes in (((0.9,), 1, True), ((0.9, 0.8), 2, True), ((0.9, 0.8), 2, False)):
        before = (tmp_path / "model.safetensors").read_bytes()
        summary = review_trained(tmp_path, replace(SMALL, review_certainties=certainties))
        assert (len(summary["review"]), summary["steps"]) == (had, 2)
        assert ((tmp_path / "model.safetensors").read_bytes() != before) == changes
    assert AutoTokenizer.from_pretrained(tmp_path)("Mira")["input_ids"]
