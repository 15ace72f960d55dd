"""What a model still writes of texts it should have forgotten: greedy continuations and extraction strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evaluators.continuations import Scored
from evaluators.encoding import Pair, check_length, encode_pairs, meaningless_ids
from evaluators.generation import continue_greedily
from evaluators.measurement import EvaluationError, Measurement, shorten


def encode_answers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    records: Sequence[str],
    tokens: int,
    *,
    cut: bool = False,
) -> list[Pair]:
    """Encode (prompt, answer) texts, with `cut` only the first `tokens` ids of an answer.

    `records` are the names of the texts in errors. Raises EvaluationError for an answer without tokens, and for a
    prompt after which the model has no positions for the answer or for `tokens` generated ones.
    """
    ignored = meaningless_ids(tokenizer)
    pairs = encode_pairs(tokenizer, texts)
    if cut:
        pairs = [Pair(pair.prompt, pair.target[:tokens]) for pair in pairs]
    for record, (prompt, answer), pair in zip(records, texts, pairs, strict=True):
        if ignored.issuperset(pair.target):
            raise EvaluationError(f"{record}: the answer {answer!r} has no tokens")
        check_length(model, len(pair.prompt) + tokens, f"{record}: {shorten(prompt)!r} with {tokens} new tokens")
        check_length(model, len(pair.prompt) + len(pair.target), f"{record}: {shorten(prompt)!r} with its answer")
    return pairs


def record_names(key: str, n: int) -> list[str]:
    """Return the names of the `n` records of a key of the world."""
    return [f"world.{key}, record {number}" for number in range(1, n + 1)]


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    tokens: int,
    batch_size: int,
    stops: Sequence[str] = (),
) -> list[str | None]:
    """Return the greedy continuation of each prompt, up to `tokens` ids; None for NaN or infinite logits.

    A text ends before the first of `stops` in it.
    """
    found = continue_greedily(model, tokenizer, prompts, [tokens] * len(prompts), batch_size)
    return [None if ids is None else _cut(text_of(tokenizer, ids), stops) for ids in found]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids, without special tokens and the spaces around it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()


def extraction_strength(scored: Scored, target: Sequence[int]) -> float:
    """Return the share of a text that its beginning extracts (Carlini et al., 2021; Wang et al., 2025).

    1 - k / n for the smallest k such that the model writes tokens k + 1 to n of `target` greedily after its first k; 0
    if it gets the last token wrong. NaN for broken logits.
    """
    if math.isnan(scored.total):
        return math.nan
    right = 0
    for said, wanted in zip(reversed(scored.greedy_ids), reversed(target), strict=True):
        if said != wanted:
            break
        right += 1
    return right / len(target)


def measure_extraction(metric: str, scored: Sequence[Scored], targets: Sequence[Sequence[int]]) -> Measurement:
    """Measure the mean extraction strength of texts to forget; lower is better."""
    values = [extraction_strength(one, target) for one, target in zip(scored, targets, strict=True)]
    return Measurement.mean(
        metric, values, higher_is_better=False, note="share of the tokens, from the end, that greedy decoding gives"
    )
