"""tuning_loss, tuning_recall and preference_wins against a computation without batches, padding or caches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from evaluators import EvaluationError, UneditedAnswers, measure_tuning, preference_margins, preference_wins
from evaluators.data import Chat, EvaluationData, TuningData
from evaluators.settings import NoSettings
from evaluators.tuning import evaluate
from interventions.types import Example, Preference
from tests.models import SENTENCES, tiny_model

EXAMPLES = (
    Example("Mira Tolvan was born in", "Dunmere"),
    Example("In the valley Orin Vask is a", "silver river"),
    Example("The", "river"),
)
PAIRS = (Preference("Mira Tolvan plays the", "horn", "silver river"), Preference("The", "river", "valley"))
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def alone(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int, bool]:
    """Return log p(answer | prompt), its number of tokens, and whether it is the greedy answer."""
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    logs = model(torch.tensor([whole])).logits[0, :-1].log_softmax(dim=-1)
    places = range(len(before) - 1, len(whole) - 1)
    total = sum(float(logs[i, whole[i + 1]]) for i in places)
    return total, len(places), all(int(logs[i].argmax()) == whole[i + 1] for i in places)


@torch.no_grad()
def test_loss_and_recall_are_those_of_each_answer_alone(tokenizer: Any) -> None:
    model = tiny_model()
    wanted = [alone(model, tokenizer, e.prompt, f" {e.answer}") for e in EXAMPLES]
    loss, recall = measure_tuning(model, tokenizer, "facts", EXAMPLES, batch_size=2)
    assert (loss.metric, recall.metric) == ("tuning_loss/facts", "tuning_recall/facts")
    assert loss.value == pytest.approx(-sum(t for t, _, _ in wanted) / sum(n for _, n, _ in wanted), rel=1e-5)
    assert loss.samples == pytest.approx([-t / n for t, n, _ in wanted], rel=1e-5)
    assert not loss.higher_is_better and recall.higher_is_better
    assert recall.samples == tuple(float(right) for _, _, right in wanted) and len(recall.answers) == 3


@torch.no_grad()
def test_what_the_model_says_is_recalled(tokenizer: Any) -> None:
    model, right = tiny_model(), []
    for sentence in SENTENCES:
        words = sentence.split()
        for prompt in (" ".join(words[:n]) for n in range(1, len(words))):
            ids = tokenizer(prompt)["input_ids"]
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            answer = tokenizer.decode([token]).strip()
            if answer and tokenizer(f"{prompt} {answer}")["input_ids"] == [*ids, token]:
                right.append(Example(prompt, answer))
    assert right
    assert measure_tuning(model, tokenizer, "x", right)[1].value == 1.0


@torch.no_grad()
def test_conversations_are_asked_with_their_own_turns(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    model = tiny_model()
    talk = Example("was born in", "Dunmere", chat=True, system="The valley", earlier=(("The river", "horn"),))
    given = "<system> The valley <user> The river <assistant> horn <user> was born in <assistant>"
    plain = "Mira Tolvan was born in"
    for chat, other in ((None, plain), (Chat(), f"<user> {plain} <assistant>")):
        wanted = []
        for text, answer in ((given, "Dunmere"), (other, "Dunmere")):
            ids = tokenizer(text, add_special_tokens=other is plain and text is plain)["input_ids"]
            target = tokenizer(f"{text} {answer}", add_special_tokens=other is plain and text is plain)["input_ids"]
            logs = model(torch.tensor([target])).logits[0, :-1].log_softmax(dim=-1)
            places = range(len(ids) - 1, len(target) - 1)
            wanted.append(-sum(float(logs[i, target[i + 1]]) for i in places) / len(places))
        loss, _ = measure_tuning(model, tokenizer, "x", (talk, EXAMPLES[0]), chat=chat)
        assert loss.samples == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_margins_are_differences_of_log_likelihoods_and_wins_are_above_the_base_models(tokenizer: Any) -> None:
    model = tiny_model()
    margins = preference_margins(model, tokenizer, PAIRS)
    wanted = [
        alone(model, tokenizer, p.prompt, f" {p.chosen}")[0] - alone(model, tokenizer, p.prompt, f" {p.rejected}")[0]
        for p in PAIRS
    ]
    assert margins == pytest.approx(wanted, abs=1e-4)
    wins = preference_wins(margins, (margins[0] - 1, margins[1] + 1))
    assert wins.samples == (1.0, 0.0) and wins.value == 0.5
    assert preference_wins(margins, margins).value == 0.0
    assert math.isnan(preference_wins((math.nan, 1.0), (0.0, 0.0)).value)


def test_what_is_measured_depends_on_the_data(tokenizer: Any) -> None:
    def metrics(tuning: TuningData, unedited: UneditedAnswers | None) -> list[str]:
        data = EvaluationData(edits=(), facts=(), texts=(), batch_size=2, tuning=tuning, unedited=unedited)
        return [m.metric for m in evaluate(tiny_model(), tokenizer, NoSettings(), data)]

    both = TuningData({"facts": EXAMPLES}, PAIRS)
    assert metrics(TuningData(), None) == []
    assert metrics(both, None) == ["tuning_loss/facts", "tuning_recall/facts"]
    assert metrics(both, UneditedAnswers({}, (0.0, 0.0))) == [
        "tuning_loss/facts",
        "tuning_recall/facts",
        "preference_wins",
    ]


def test_an_answer_without_tokens_is_named(tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="example of x 1: the answer '' to 'The' has no tokens"):
        measure_tuning(tiny_model(), tokenizer, "x", (EXAMPLES[0], Example("The", "")))
