"""How many prompts are refused: by phrases, and by the probability of their starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from evaluators import Chat, EvaluationError, is_refusal, measure_refusal, measure_refusal_score, refusal
from evaluators.data import EvaluationData
from evaluators.metrics import find_metric
from evaluators.settings import RefusalSettings

PROMPTS = ("Mira Tolvan was born in", "The capital of Ostria is", "Question: where does it end? Answer:")


def test_phrases_tell_a_refusal_in_upper_or_lower_case() -> None:
    assert is_refusal("I\u2019m Sorry, but I cannot help.") and is_refusal("Well... as an AI, no")
    assert not is_refusal("Here is how") and not is_refusal("")
    assert not is_refusal("Well, I cannot", anywhere=False) and is_refusal("  I\ncannot", anywhere=False)
    assert is_refusal("Das kann ich nicht", ("kann ich nicht",))


def test_the_rate_is_the_share_of_refused_prompts(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["I cannot do that.", "Sure!", "No, I can't."]
    monkeypatch.setattr(refusal, "continuations", lambda *_: said)
    found = measure_refusal(model, tokenizer, PROMPTS)
    assert found.samples == (1.0, 0.0, 1.0) and found.answers == tuple(said) and not found.higher_is_better
    assert found.value == pytest.approx(2 / 3)
    own = RefusalSettings(refusal_phrases=["sure"], refusal_anywhere=False)
    assert measure_refusal(model, tokenizer, PROMPTS, own).samples == (0.0, 1.0, 0.0)
    monkeypatch.setattr(refusal, "continuations", lambda *_: [None, *said[1:]])
    assert math.isnan(measure_refusal(model, tokenizer, PROMPTS).value)


def probability(model: Any, tokenizer: Any, prompt: str, start: str) -> float:
    ids, end = tokenizer(f"{prompt} {start}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return math.exp(sum(float(logs[i - 1, ids[i]]) for i in range(end, len(ids))))


def test_the_score_is_the_log_odds_of_the_starts(model: Any, tokenizer: Any) -> None:
    settings = RefusalSettings(refusal_starts=["no", "in the", "in the end"])  # the last one is counted with the second
    found = measure_refusal_score(model, tokenizer, PROMPTS, settings, batch_size=2)
    shares = [sum(probability(model, tokenizer, p, s) for s in ("no", "in the")) for p in PROMPTS]
    assert found.samples == pytest.approx([math.log(p / (1 - p)) for p in shares], abs=1e-3)
    against = RefusalSettings(refusal_starts=["no"], compliance_starts=["yes", "sure"])
    found = measure_refusal_score(model, tokenizer, PROMPTS, against)
    yes = [sum(probability(model, tokenizer, p, s) for s in ("yes", "sure")) for p in PROMPTS]
    no = [probability(model, tokenizer, p, "no") for p in PROMPTS]
    assert found.samples == pytest.approx([math.log(a / b) for a, b in zip(no, yes, strict=True)], abs=1e-3)


def test_a_certain_refusal_has_a_finite_score() -> None:
    assert math.isfinite(refusal._log_rest(0.0)) and refusal._log_rest(math.log(0.25)) == pytest.approx(math.log(0.75))
    assert math.isnan(refusal._log_rest(math.nan)) and math.isnan(refusal._log_sum([0.0, math.nan]))


@pytest.mark.parametrize("wanted", [False, True])
def test_each_set_has_its_metrics(model: Any, tokenizer: Any, wanted: bool) -> None:
    data = EvaluationData((), (), (), 4, refusal={"harmful": PROMPTS[:2], "harmless": PROMPTS[2:]})
    settings = RefusalSettings(refusal_tokens=2, refusal_starts=["no"], refusal_wanted=wanted)
    found = {one.metric: one for one in refusal.evaluate(model, tokenizer, settings, data)}
    assert list(found) == ["refusal_rate", "refusal_score", "over_refusal_rate", "over_refusal_score"]
    assert [one.n for one in found.values()] == [2, 2, 1, 1]
    assert [one.higher_is_better for one in found.values()] == [wanted, wanted, False, False]
    assert all(find_metric(name).advice for name in found)
    assert not refusal.evaluate(model, tokenizer, settings, EvaluationData((), (), (), 4))


def test_too_few_positions_and_no_template_are_one_line(model: Any, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match=r"refusal_rate: .* needs"):
        measure_refusal(model, tokenizer, PROMPTS, RefusalSettings(refusal_tokens=10_000))
    with pytest.raises(EvaluationError, match="chat template"):
        measure_refusal(model, tokenizer, PROMPTS, chat=Chat())
