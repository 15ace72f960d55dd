"""Text to token ids, and padded batches of them, without touching the tokenizer's own settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from evaluators.measurement import EvaluationError
from interventions.tokens import Pair as Pair
from interventions.tokens import join, read


class Batch(NamedTuple):
    """Token ids and attention mask, both (rows, longest), int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text as the model reads a beginning: with BOS if the tokenizer adds it.

    Never truncates, and ends with no special token, since the text goes on.
    Raises EvaluationError for a text without any token.
    """
    rows = [row.ids for row in read(tokenizer, texts)]
    _check(rows, texts)
    return rows


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Return the ids of (prompt, target) pairs as `interventions.tokens.join` splits them, editors' text included.

    Raises EvaluationError for a prompt of which nothing is left to begin with.
    """
    joined = join(tokenizer, pairs)
    _check([pair.prompt for pair in joined], [prompt for prompt, _ in pairs])
    return joined


def _check(rows: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    for row, (ids, text) in enumerate(zip(rows, texts, strict=True)):
        if not ids:
            raise EvaluationError(
                f"text {row} ({text!r}) has no tokens to start from; give a prompt that is not empty, or a longer one"
            )


def meaningless_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that say nothing in an answer: special tokens and the bare space.

    A tokenizer that writes a space as a token of its own shows it as the first id of any word.
    """

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    hello, word = plain(" Hello"), plain(" Word")
    shared = hello[:1] if hello[:1] == word[:1] else []
    return frozenset([*tokenizer.all_special_ids, *plain(" "), *shared])


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"], pad_id: int, device: Any) -> Batch:
    """Return `rows` as one batch padded on `side`; the mask hides the padding."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, ids in enumerate(rows):
        place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, place] = 1
    return Batch(input_ids.to(device), attention_mask.to(device))


def padding_id(tokenizer: Any) -> int:
    """Return an id to fill up rows with; masked, so any id of the vocabulary serves."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def check_length(model: Any, tokens: int, what: str) -> None:
    """Raise EvaluationError if `tokens` positions are more than the model has."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise EvaluationError(
            f"{what} needs {tokens} positions but the model has {limit}; nothing is truncated silently: "
            "shorten the text, or the window, or use a model with a longer context"
        )
