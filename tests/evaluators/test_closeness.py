"""Closeness to the base model against full softmaxes over single windows, and flips against counting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import transformers

from evaluators import EvaluationError, Measurement, UneditedAnswers, predictions
from evaluators.closeness import capture_predictions, evaluate
from evaluators.data import EvaluationData
from evaluators.flips import measure_flips
from evaluators.perplexity import measure_perplexity
from evaluators.predictions import Predictions
from evaluators.settings import PerplexitySettings
from tests.models import _SIZE, SENTENCES, tiny_model, tiny_tokenizer

WINDOW = 16
ROUNDING = 1e-6
"""Nats: log-probabilities are float32."""
FAMILIES: dict[str, Any] = {
    "llama": "llama",
    "gemma2": "gemma2",  # squashes its logits
    "opt": "opt-post-norm",  # projects before the output layer
    "granite": transformers.GraniteConfig(**_SIZE, logits_scaling=3.0),
    "cohere": transformers.CohereConfig(**_SIZE, logit_scale=0.25),  # tied: the output layer is the input layer
    "neox": "gpt_neox",
}
MARKS = {name: (pytest.mark.slow,) if name in ("opt", "granite", "neox") else () for name in FAMILIES}


@pytest.fixture(scope="module", name="tokenizer")
def one_tokenizer() -> Any:
    return tiny_tokenizer()


def changed(model: Any, *, head: bool) -> None:
    """Change all weights, or all but those of the output layer."""
    own = set() if head else {id(p) for p in model.get_output_embeddings().parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in own:
                parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))


def measured(model: Any, tokenizer: Any, base: Predictions | None, *, window: int = WINDOW) -> dict[str, Measurement]:
    unedited = UneditedAnswers({}, predictions=base)
    data = EvaluationData(edits=(), facts=(), texts=SENTENCES, batch_size=4, unedited=unedited)
    return {m.metric: m for m in evaluate(model, tokenizer, PerplexitySettings(window=window), data)}


def captured(model: Any, tokenizer: Any) -> Predictions:
    return capture_predictions(model, tokenizer, SENTENCES, window=WINDOW, batch_size=4)


def logits_by_window(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Return the logits (tokens, vocabulary) in float64 that predict the tokens of each window after BOS."""
    ids = tokenizer("\n\n".join(SENTENCES), add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids[start : start + WINDOW]] for start in range(0, len(ids), WINDOW)]
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0, :-1].double() for row in rows]


@pytest.mark.parametrize(
    ("family", "head"), [("llama", False), *(pytest.param(name, True, marks=marks) for name, marks in MARKS.items())]
)
def test_equals_full_softmaxes(tokenizer: Any, family: str, head: bool) -> None:
    model = tiny_model(FAMILIES[family])
    before, base = logits_by_window(model, tokenizer), captured(model, tokenizer)
    assert base.head is not None, "only the input of the output layer is kept"
    assert [(m.value, m.stderr) for m in measured(model, tokenizer, base).values()] == [(0.0, 0.0), (1.0, 0.0)]
    torch.manual_seed(1)
    changed(model, head=head)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    after, found = logits_by_window(model, tokenizer), measured(model, tokenizer, base)
    pairs = [(x.softmax(-1), y.softmax(-1)) for x, y in zip(before, after, strict=True)]
    kl = [(p * (p.log() - q.log())).sum(-1) for p, q in pairs]
    same = [(p.argmax(-1) == q.argmax(-1)).double() for p, q in pairs]
    assert found["kl_to_base"].samples == pytest.approx([x.mean().item() for x in kl], abs=ROUNDING)
    assert found["kl_to_base"].value == pytest.approx(torch.cat(kl).mean().item(), abs=ROUNDING)
    assert found["top1_agreement"].samples == pytest.approx([x.mean().item() for x in same])
    assert found["top1_agreement"].value == pytest.approx(torch.cat(same).mean().item())
    assert found["kl_to_base"].value > 100 * ROUNDING and found["top1_agreement"].value < 1
    assert (found["kl_to_base"].higher_is_better, found["top1_agreement"].higher_is_better) == (False, True)
    assert found["kl_to_base"].stderr is not None and len(kl[-1]) < WINDOW, "the last window is a partial one"
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_half_precision_is_kept_to_the_last_bit(tokenizer: Any) -> None:
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    base = captured(model, tokenizer)
    assert base.kept[0].dtype == torch.bfloat16
    assert [m.value for m in measured(model, tokenizer, base).values()] == [0.0, 1.0]


def test_logits_are_kept_where_the_output_layer_cannot_be_run_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    base = captured(model, tokenizer)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    whole = captured(model, tokenizer)
    assert whole.head is None and whole.kept[0].shape[-1] == model.config.vocab_size
    monkeypatch.undo()
    torch.manual_seed(1)
    changed(model, head=True)
    assert measured(model, tokenizer, whole)["kl_to_base"] == measured(model, tokenizer, base)["kl_to_base"]


def test_only_the_first_windows_are_compared_if_the_rest_takes_too_much_memory(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    everything = captured(model, tokenizer)
    monkeypatch.setattr(predictions, "LIMIT", 2 * everything.kept[0].nbytes * 4)
    base = captured(model, tokenizer)
    assert len(base.rows) == len(everything.rows) > 8 and len(base.kept) == 8
    changed(model, head=False)
    found = measured(model, tokenizer, base)["kl_to_base"]
    assert found.samples == measured(model, tokenizer, everything)["kl_to_base"].samples[:8]
    assert found.note.startswith("8 windows, 128 tokens")


def test_one_pass_serves_perplexity_and_closeness(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluators import perplexity

    model = tiny_model("llama")
    base, passes = capture_predictions(model, tokenizer, SENTENCES, window=WINDOW, batch_size=100), []
    read = perplexity.read
    monkeypatch.setattr(perplexity, "read", lambda *given: passes.append(1) or read(*given))
    unedited = UneditedAnswers({}, predictions=base)
    data = EvaluationData(edits=(), facts=(), texts=SENTENCES, batch_size=100, unedited=unedited)
    settings = PerplexitySettings(window=WINDOW)
    (first,) = perplexity.evaluate(model, tokenizer, settings, data)
    assert len(evaluate(model, tokenizer, settings, data)) == 2
    assert len(passes) == 2, "one for the full windows, one for the last"
    assert first == measure_perplexity(model, tokenizer, SENTENCES, window=WINDOW, batch_size=100)
    passes.clear()
    same = EvaluationData(edits=(), facts=(), texts=SENTENCES, batch_size=100, unedited=unedited, is_base=True)
    assert evaluate(model, tokenizer, settings, same) == evaluate(model, tokenizer, settings, data)
    assert perplexity.evaluate(model, tokenizer, settings, same) == [base.perplexity] and not passes


def test_broken_logits_are_nan(tokenizer: Any) -> None:
    model = tiny_model("llama")
    base = captured(model, tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    assert all(math.isnan(m.value) for m in measured(model, tokenizer, base).values())


def test_ids_that_the_base_model_excludes_do_not_count() -> None:
    row = torch.tensor([[0.0, -math.inf, 1.0]])
    assert predictions._difference(row, row).tolist() == [0.0, 1.0]
    p = 1 / (1 + math.e)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    kl = predictions._difference(row, torch.zeros(1, 3))[0].item()
    assert kl == pytest.approx(math.log(3) - entropy, abs=ROUNDING)
    assert predictions._difference(torch.zeros(1, 3), row)[0] == math.inf


def test_other_texts_and_vocabularies_are_refused(tokenizer: Any) -> None:
    model = tiny_model("llama")
    base = captured(model, tokenizer)
    with pytest.raises(EvaluationError, match="other tokens than for the base model"):
        measured(model, tokenizer, base, window=WINDOW + 1)
    logits = dataclasses.replace(base, kept=[torch.zeros(len(row), 5) for row in base.rows], head=None)
    with pytest.raises(EvaluationError, match="320 ids cannot be compared with the base model's 5"):
        measured(model, tokenizer, logits)
    assert measured(model, tokenizer, None) == {}


def answers(metric: str, samples: list[float], said: str = "", **more: Any) -> Measurement:
    return Measurement.mean(metric, samples, answers=said.split(), **more)


def test_flips_count_both_ways_and_churn_counts_other_answers() -> None:
    before = answers("recall", [1, 1, 1, 0, 0, 0], "a b c d e f")
    after = answers("recall", [1, 0, 1, 1, 0, math.nan], "a x c y z f")
    found = {m.metric: m for m in measure_flips([before], [after])}
    assert list(found) == ["flips/recall", "flips_to_wrong/recall", "churn/recall"]
    assert [found[name].samples for name in found] == [(0, 1, 0, 1, 0, 0), (0, 1, 0, 0, 0, 0), (0, 1, 0, 1, 1, 0)]
    assert [m.value for m in found.values()] == pytest.approx([1 / 3, 1 / 6, 1 / 2])
    assert not any(m.higher_is_better for m in found.values())
    assert all(m.value == 0 == m.stderr for m in measure_flips([before], [before]))


def test_flips_of_what_should_stay_only() -> None:
    right, wrong = answers("accuracy/hazardous", [1, 1], higher_is_better=False), answers("edit_success_exact", [1, 0])
    assert measure_flips([right, wrong], [right, wrong]) == []  # what unlearning and edits change on purpose
    harmless = answers("accuracy/harmless", [1, 0, 1])
    (found, lost) = measure_flips([harmless], [answers("accuracy/harmless", [1, 1, 0])])  # answers are unknown
    assert (found.metric, lost.metric) == ("flips/accuracy/harmless", "flips_to_wrong/accuracy/harmless")
    task = answers("accuracy/botany", [1, 0], "a b")
    assert [m.metric for m in measure_flips([task], [task])] == ["flips/accuracy/botany"]  # one of dozens
    assert measure_flips([harmless], [answers("accuracy/harmless", [1, 0.5, 1])]) == []
    assert measure_flips([harmless], [answers("accuracy/harmless", [1, 0])]) == []
    assert measure_flips([], [harmless]) == []


def test_flips_keep_weights_and_clusters() -> None:
    more: dict[str, Any] = {"weights": [1, 1, 2], "clusters": [0, 0, 1]}
    found = measure_flips([answers("recall", [1, 1, 1], **more)], [answers("recall", [1, 1, 0], **more)])[0]
    assert (found.value, found.clusters, found.weights) == (0.5, (0, 0, 1), (1, 1, 2))
