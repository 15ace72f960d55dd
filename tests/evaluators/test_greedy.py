"""Batched greedy generation against a loop of full forward passes, one prompt at a time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluators import EvaluationError, greedy

PROMPTS = [
    "Mira Tolvan was born in",
    "The",
    "Question: where does the river end? Answer:",
    "a city of nine bridges, in the old harbour of Belmar",
    "Ostria is",
    "works as a glass blower",
    "Dren",
]


def naive(model: Any, tokenizer: Any, prompt: str, budget: int) -> list[int]:
    """Generate with full passes, without cache, padding or `generate`."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < budget:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_full_passes_one_prompt_at_a_time(model: Any, tokenizer: Any, batch_size: int) -> None:
    budgets = [8, 3, 5, 1, 0, 7, 12]
    expected = [naive(model, tokenizer, p, n) for p, n in zip(PROMPTS, budgets, strict=True)]
    assert len({tuple(ids) for ids in expected}) > 4, "the model must not say the same thing everywhere"
    assert greedy(model, tokenizer, PROMPTS, budgets, batch_size) == expected


def test_the_models_own_generation_config_plays_no_part(model: Any, tokenizer: Any) -> None:
    expected = greedy(model, tokenizer, PROMPTS, 6)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p = True, 9.0, 3, 0.5
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 5.0, 1, 4
    own.max_length, own.min_new_tokens = 3, 6
    own.suppress_tokens = [ids[0] for ids in expected if ids]
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert greedy(model, tokenizer, PROMPTS, 6) == expected
    finally:
        logger.removeHandler(handler)
    assert messages == []


def test_stops_before_the_end_of_sequence_token(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"capital": "New", "New": "York", "York": "</s>", "</s>": "tea", "likes": "tea", "tea": "tea"})
    prompts = ["Ada capital", "Ada likes", "Ada was born in capital"]
    words = [word_tokenizer.convert_ids_to_tokens(ids) for ids in greedy(model, word_tokenizer, prompts, 4)]
    assert words == [["New", "York"], ["tea"] * 4, ["New", "York"]]


def test_stops_at_every_end_that_the_model_names(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"capital": "New", "New": "York", "York": "tea"})
    model.generation_config.eos_token_id = [1, word_tokenizer.convert_tokens_to_ids("York")]
    (ids,) = greedy(model, word_tokenizer, ["Ada capital"], 5)
    assert word_tokenizer.convert_ids_to_tokens(ids) == ["New"]


def test_leaves_model_and_tokenizer_as_found(model: Any, tokenizer: Any, unchanged: Callable[..., None]) -> None:
    tokenizer.pad_token = None
    unchanged(model, tokenizer, lambda: greedy(model, tokenizer, PROMPTS, 3))


def test_leaves_them_as_found_after_an_error(model: Any, tokenizer: Any, unchanged: Callable[..., None]) -> None:
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("inf"))

    def fail() -> None:
        with pytest.raises(EvaluationError):
            greedy(model, tokenizer, PROMPTS, 3)

    unchanged(model, tokenizer, fail)


def test_nan_logits_name_the_prompt(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"likes": "tea"})
    with torch.no_grad():  # only the embedding of one word is broken
        model.model.embed_tokens.weight[word_tokenizer.convert_tokens_to_ids("Oslo")] = float("nan")
    assert greedy(model, word_tokenizer, ["Ada likes"], 1)
    with pytest.raises(EvaluationError, match=r"Ada likes Oslo.*NaN"):
        greedy(model, word_tokenizer, ["Ada likes", "Ada likes Oslo"], 1)


def test_a_prompt_that_does_not_fit_is_an_error(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"likes": "tea"})
    prompt = " ".join(["tea"] * 62)  # and BOS: 63 of 64 positions
    assert len(greedy(model, word_tokenizer, [prompt], 1)) == 1
    with pytest.raises(EvaluationError, match="65 positions but the model has 64"):
        greedy(model, word_tokenizer, [prompt], 2)


def test_a_prompt_without_tokens_is_an_error(bigram: Any, word_tokenizer: Any) -> None:
    word_tokenizer.backend_tokenizer.post_processor = None  # no BOS any more
    with pytest.raises(EvaluationError, match=r"text 1 .* has no tokens"):
        greedy(bigram({}), word_tokenizer, ["Ada", ""], 2)


def test_an_end_that_the_tokenizer_appends_is_not_part_of_a_prompt(bigram: Any, word_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    word_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert word_tokenizer("Ada likes")["input_ids"][-1] == 1
    (ids,) = greedy(bigram({"likes": "tea"}), word_tokenizer, ["Ada likes"], 1)
    assert word_tokenizer.convert_ids_to_tokens(ids) == ["tea"]


def test_wrong_numbers_of_tokens_and_batches_are_errors(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({})
    with pytest.raises(EvaluationError, match="1 numbers for 2 prompts"):
        greedy(model, word_tokenizer, ["Ada", "Bela"], [1])
    with pytest.raises(EvaluationError, match="batch_size"):
        greedy(model, word_tokenizer, ["Ada"], 1, batch_size=0)
    assert greedy(model, word_tokenizer, [], 3) == []
