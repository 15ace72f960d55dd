"""Encode and pad texts without changing the tokenizer's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from evaluators.measurement import EvaluationError
from interventions.tokens import Chat, ChatError, ask, join
from interventions.tokens import Pair as Pair


class Batch(NamedTuple):
    """Token ids and attention mask, both (rows, longest), int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def encode(tokenizer: Any, texts: Sequence[str], chat: Chat | None = None) -> list[list[int]]:
    """Return the ids of each text, with BOS if the tokenizer adds it, but no special token at the end.

    With `chat`, the texts are put into the chat template, which then decides on BOS. Never truncates.
    Raises EvaluationError for a text without tokens, and for a template that cannot be applied.
    """
    with _readable():
        rows = [row.ids for row in ask(tokenizer, texts, chat)]
    _check(rows, texts)
    return rows


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]], chat: Chat | None = None) -> list[Pair]:
    """Return the ids of (prompt, target) pairs, split like for the editors (`interventions.tokens.join`).

    Raises EvaluationError for a prompt without tokens, and for a chat template that cannot be applied.
    """
    with _readable():
        joined = join(tokenizer, pairs, chat=chat)
    _check([pair.prompt for pair in joined], [prompt for prompt, _ in pairs])
    return joined


@contextmanager
def _readable() -> Iterator[None]:
    """Make EvaluationError of ChatError."""
    try:
        yield
    except ChatError as error:
        raise EvaluationError(str(error)) from error


def _check(rows: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    for row, (ids, text) in enumerate(zip(rows, texts, strict=True)):
        if not ids:
            raise EvaluationError(f"text {row} ({text!r}) has no tokens to start from; give a longer prompt")


def meaningless_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids without content: special tokens and the single space.

    If a tokenizer has separate tokens for spaces, every word starts with the same id.
    """

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    hello, word = plain(" Hello"), plain(" Word")
    shared = hello[:1] if hello[:1] == word[:1] else []
    return frozenset([*tokenizer.all_special_ids, *plain(" "), *shared])


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"], pad_id: int, device: Any) -> Batch:
    """Return `rows` as a batch, padded on `side` and masked."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, ids in enumerate(rows):
        place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, place] = 1
    return Batch(input_ids.to(device), attention_mask.to(device))


def padding_id(tokenizer: Any) -> int:
    """Return the padding id: the tokenizer's, or any other because padding is masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def check_length(model: Any, tokens: int, what: str) -> None:
    """Raise EvaluationError if the model has fewer than `tokens` positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < tokens:  # XLNet has -1 for no limit
        raise EvaluationError(
            f"{what} needs {tokens} positions but the model has {limit}; "
            "shorten the text or the window, or use a model with a longer context"
        )
