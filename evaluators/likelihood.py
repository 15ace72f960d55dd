"""Log-likelihood of given continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from evaluators.continuations import score
from evaluators.encoding import check_length, encode_pairs, padding_id
from evaluators.measurement import EvaluationError
from evaluators.state import borrowed
from interventions.tokens import Chat


class LogLikelihood(NamedTuple):
    """The natural log-probability of a target after its prompt, summed over `tokens` tokens."""

    total: float
    tokens: int


def log_likelihood(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 32, *, chat: Chat | None = None
) -> list[LogLikelihood]:
    """Return log p(target | prompt) of each (prompt, target), joined as `interventions.tokens.join` does.

    With `chat`, the prompts are put into the chat template.
    Only the target's tokens are scored, without BOS between prompt and target. Computed in float32 for
    every dtype; broken logits give NaN, which fails every gate.
    Raises EvaluationError for a target without tokens or a text that is too long.
    """
    encoded = encode_pairs(tokenizer, pairs, chat)
    for row, ((prompt, target), ids) in enumerate(zip(pairs, encoded, strict=True)):
        if not ids.target:
            raise EvaluationError(f"pair {row} ({prompt!r}): target {target!r} has no tokens")
        check_length(model, len(ids.prompt) + len(ids.target), f"pair {row} ({prompt!r})")
    with borrowed(model, tokenizer):
        found = score(model, encoded, fill=padding_id(tokenizer), rows=batch_size)
    return [LogLikelihood(scored.total, scored.tokens) for scored in found]
