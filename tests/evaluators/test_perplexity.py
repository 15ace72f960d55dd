"""Perplexity against known logits and a loop over single tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import processors

from evaluators import EvaluationError, Probe, measure_answer_perplexity, measure_perplexity, score_answers

TEXTS = [
    "Mira Tolvan was born in Karth and works as a glass blower.",
    "The capital of Ostria is Belmar, a city of nine bridges in the old harbour.",
    "Question: where does the river Ulm end? Answer: in the salt lakes of Dren.",
]


def naive(model: Any, tokenizer: Any, window: int) -> list[list[float]]:
    """Return the NLL of each scored token by window, from one full pass a token."""
    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    windows = []
    for start in range(0, len(ids), window):
        piece = [tokenizer.bos_token_id, *ids[start : start + window]]
        losses = []
        for place in range(1, len(piece)):
            with torch.no_grad():
                logits = model(torch.tensor([piece[:place]])).logits[0, -1]
            losses.append((logits.logsumexp(0) - logits[piece[place]]).item())
        windows.append(losses)
    return windows


@pytest.mark.parametrize("batch_size", [1, 16])
def test_equals_a_loop_over_tokens(model: Any, tokenizer: Any, batch_size: int) -> None:
    window = 20
    expected = naive(model, tokenizer, window)
    assert 0 < len(expected[-1]) < window, "the last window must be a partial one"
    losses = [loss for losses in expected for loss in losses]
    got = measure_perplexity(model, tokenizer, TEXTS, window=window, batch_size=batch_size)
    assert math.log(got.value) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert got.samples == pytest.approx([sum(w) / len(w) for w in expected], rel=1e-5)
    assert (got.n, got.higher_is_better) == (len(expected), False)
    assert f"{window} tokens, {len(losses)} tokens scored" in got.note


def test_known_logits(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"Ada": "likes", "likes": "tea", "tea": "Ada"})
    got = measure_perplexity(model, word_tokenizer, ["Ada likes tea", "Ada likes tea"], window=3)
    size = len(word_tokenizer)
    known = math.log(math.exp(4) + size - 1) - 4  # a follower
    first = math.log(size)  # after BOS every word is as likely
    assert got.samples == pytest.approx([(first + 2 * known) / 3] * 2, rel=1e-6)
    assert got.value == pytest.approx(math.exp((first + 2 * known) / 3), rel=1e-6)
    assert got.stderr == pytest.approx(0, abs=1e-5)  # both windows are alike


def test_error_of_equal_windows_is_that_of_their_mean(model: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"][:60])
    got = measure_perplexity(model, tokenizer, [text], window=12)
    assert got.n == 5
    nll = torch.tensor(got.samples, dtype=torch.float64)
    assert got.stderr == pytest.approx(got.value * nll.std().item() / math.sqrt(5), rel=1e-9)


def test_a_short_last_window_weighs_by_its_tokens(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"tea": "tea"})
    got = measure_perplexity(model, word_tokenizer, ["tea " * 9 + "Rome"], window=9)
    assert got.n == 2
    assert math.log(got.value) == pytest.approx((9 * got.samples[0] + got.samples[1]) / 10)


def test_where_the_tokenizer_adds_no_bos_the_first_token_is_context(bigram: Any, word_tokenizer: Any) -> None:
    # There is a BOS, as GPT-2 has one, but it is put before no text.
    word_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    model = bigram({"Ada": "likes", "likes": "tea"})
    got = measure_perplexity(model, word_tokenizer, ["Ada likes tea Ada likes tea Rome"], window=3)
    known = math.log(math.exp(4) + len(word_tokenizer) - 1) - 4
    assert got.samples == pytest.approx([known, known])  # the lone last word has no context: not scored
    assert "4 tokens scored" in got.note and "first token" in got.note


def test_texts_are_joined_by_the_separator(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"tea": "</s>", "</s>": "Ada"})
    joined = measure_perplexity(model, word_tokenizer, ["Ada tea", "Ada tea"], separator="</s>", window=32)
    assert "5 tokens scored" in joined.note
    assert joined.value < measure_perplexity(model, word_tokenizer, ["Ada tea", "Ada tea"], window=32).value


def test_nan_and_overflow_are_flagged_and_no_gate_can_pass_them(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({})
    texts = ["Ada likes tea Rome likes Oslo"]
    with torch.no_grad():
        model.model.embed_tokens.weight[word_tokenizer.convert_tokens_to_ids("Oslo")] = float("nan")
        model.model.embed_tokens.weight[word_tokenizer.convert_tokens_to_ids("Rome")] = float("nan")
    got = measure_perplexity(model, word_tokenizer, texts, window=3)
    assert math.isnan(got.value) and not got.value < 1e9
    assert "NOT FINITE: 1 of 2 windows" in got.note
    huge = bigram({"Ada": "Rome"})
    with torch.no_grad():
        huge.lm_head.weight.mul_(1e4)
    got = measure_perplexity(huge, word_tokenizer, ["Ada likes"], window=32)
    assert got.value == math.inf and "NOT FINITE" in got.note


def test_errors(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({})
    with pytest.raises(EvaluationError, match="heldout: the text has no tokens"):
        measure_perplexity(model, word_tokenizer, [], metric="heldout", window=32)
    with pytest.raises(EvaluationError, match="65 positions but the model has 64"):
        measure_perplexity(model, word_tokenizer, ["Ada"], window=64)
    with pytest.raises(EvaluationError, match="window of 0"):
        measure_perplexity(model, word_tokenizer, ["Ada"], window=0)


def test_leaves_model_and_tokenizer_as_found(model: Any, tokenizer: Any, unchanged: Callable[..., None]) -> None:
    unchanged(model, tokenizer, lambda: measure_perplexity(model, tokenizer, TEXTS, window=16))


ANSWERS = [
    Probe("Mira was born in", "Karth"),
    Probe("The river Ulm ends in the", "salt lakes of Dren"),
    Probe("A", "b c"),
]


@pytest.mark.parametrize("with_prompt", [False, True])
def test_answers_equal_a_loop_over_texts(model: Any, tokenizer: Any, with_prompt: bool) -> None:
    sums, counts = [], []
    for probe in ANSWERS:
        start = 1 if with_prompt else len(tokenizer(probe.prompt)["input_ids"])
        ids = tokenizer(f"{probe.prompt} {probe.answer}")["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1, "BOS stands at the start and nowhere else"
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(-sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids))))
        counts.append(len(ids) - start)
    got = measure_answer_perplexity(
        model, tokenizer, ANSWERS, metric="perplexity_edits", with_prompt=with_prompt, batch_size=2
    )
    assert got.value == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-5)
    assert got.samples == pytest.approx([s / n for s, n in zip(sums, counts, strict=True)], rel=1e-5)
    assert (got.metric, got.n, got.higher_is_better) == ("perplexity_edits", 3, False)
    assert f"3 texts, {sum(counts)} tokens scored" in got.note
    # The delta method: the error of a ratio of sums over independent texts, times the value.
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    assert got.stderr == pytest.approx(got.value * math.sqrt(3 / 2 * squares) / sum(counts), rel=1e-4)


def test_answers_scored_before_are_not_scored_again(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_answer_perplexity(model, tokenizer, ANSWERS, metric="perplexity_qa")
    scored = score_answers(model, tokenizer, ANSWERS, ["a", "b", "c"])
    monkeypatch.setattr(model, "forward", None)
    assert measure_answer_perplexity(model, tokenizer, ANSWERS, metric="perplexity_qa", scored=scored) == expected


def test_answers_broken_or_empty(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({})
    with pytest.raises(EvaluationError, match="perplexity_qa: no answers"):
        measure_answer_perplexity(model, word_tokenizer, [], metric="perplexity_qa")
    with pytest.raises(EvaluationError, match=r"perplexity_qa, record 1: the answer ' '"):
        measure_answer_perplexity(
            model, word_tokenizer, [Probe("Ada", "Rome"), Probe("Ada", " ")], metric="perplexity_qa"
        )
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    got = measure_answer_perplexity(model, word_tokenizer, [Probe("Ada", "Rome")], metric="perplexity_qa")
    assert math.isnan(got.value) and "1 of 1 texts" in got.note
