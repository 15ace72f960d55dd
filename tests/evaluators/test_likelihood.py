"""Log-likelihood of targets against a loop of single passes and against known logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluators import EvaluationError, log_likelihood

PAIRS = [
    ("Mira Tolvan was born in", "Karth"),
    ("The capital of Ostria is", "the city of nine bridges"),
    ("Question: where does the river Ulm end? Answer:", "in Dren"),
    ("The", "a"),
]


def naive(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[float, int]:
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    total = 0.0
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1]
        total += (logits[ids[place]] - logits.logsumexp(0)).item()
    return total, len(ids) - start


@pytest.mark.parametrize("batch_size", [1, 32])
def test_equals_single_passes(model: Any, tokenizer: Any, batch_size: int) -> None:
    found = log_likelihood(model, tokenizer, PAIRS, batch_size)
    for got, (prompt, target) in zip(found, PAIRS, strict=True):
        total, tokens = naive(model, tokenizer, prompt, target)
        assert got.tokens == tokens
        assert got.total == pytest.approx(total, abs=1e-5 * tokens)


def test_known_logits_and_no_bos_in_the_target(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"capital": "New", "New": "York"})
    (got,) = log_likelihood(model, word_tokenizer, [("Ada capital", "New York")])
    follower = 4 - math.log(math.exp(4) + len(word_tokenizer) - 1)
    assert got.tokens == 2
    assert got.total == pytest.approx(2 * follower, abs=1e-5)


def test_broken_weights_give_nan(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({})
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert math.isnan(log_likelihood(model, word_tokenizer, [("Ada", "Rome")])[0].total)


def test_a_target_without_tokens_is_an_error(bigram: Any, word_tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match=r"pair 1 \('Bela'\)"):
        log_likelihood(bigram({}), word_tokenizer, [("Ada", "Rome"), ("Bela", "")])


def test_leaves_model_and_tokenizer_as_found(model: Any, tokenizer: Any, unchanged: Callable[..., None]) -> None:
    unchanged(model, tokenizer, lambda: log_likelihood(model, tokenizer, PAIRS))
