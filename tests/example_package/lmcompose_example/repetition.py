"""Repetition: what an evaluator looks like."""

from __future__ import annotations

from typing import Any

from evaluators import EvaluationData, EvaluationError, Measurement, greedy
from lmcompose_example.settings import RepetitionSettings


def repetition(model: Any, tokenizer: Any, settings: RepetitionSettings, data: EvaluationData) -> list[Measurement]:
    """Return the share of tokens in greedy continuations that stood there before.

    One sample a continuation, in the order of the texts, so that two states can be compared pair by pair.
    """
    texts = data.texts[: settings.prompts]
    if not texts:
        raise EvaluationError("repetition: the world has no texts; name a file by world.perplexity")
    prompts = [" ".join(text.split()[: settings.prompt_words]) for text in texts]
    continuations = greedy(model, tokenizer, prompts, settings.length, data.batch_size)
    samples = [1 - len(set(ids)) / len(ids) if ids else 0.0 for ids in continuations]
    return [Measurement.mean("repetition", samples, higher_is_better=False, note=f"{settings.length} tokens")]
