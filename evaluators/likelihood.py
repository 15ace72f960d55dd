"""How likely a model finds a given continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from evaluators.encoding import check_length, encode_pairs, pad, padding_id
from evaluators.measurement import EvaluationError
from evaluators.state import borrowed


class LogLikelihood(NamedTuple):
    """The natural log-probability of a target after its prompt, summed over `tokens` tokens."""

    total: float
    tokens: int


def log_likelihood(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 32
) -> list[LogLikelihood]:
    """Return log p(target | prompt) of each (prompt, target), one space between the two.

    Only the target's tokens are scored and no BOS stands between prompt and target. Computed in
    float32 whatever the model's dtype; broken logits give NaN, which no gate passes.
    Raises EvaluationError for a target without tokens or a text that does not fit the model.
    """
    encoded = encode_pairs(tokenizer, pairs)
    for row, ((prompt, target), ids) in enumerate(zip(pairs, encoded, strict=True)):
        if not ids.target:
            raise EvaluationError(f"pair {row} ({prompt!r}): target {target!r} has no tokens")
        check_length(model, len(ids.prompt) + len(ids.target), f"pair {row} ({prompt!r})")

    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].prompt) - len(encoded[i].target))
    result = [LogLikelihood(0.0, 0)] * len(encoded)
    with borrowed(model, tokenizer):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # Padding on the right keeps every architecture's positions as they are without padding.
            texts = [encoded[i].prompt + encoded[i].target for i in rows]
            batch = pad(texts, "right", padding_id(tokenizer), model.device)
            logits = model(**batch._asdict(), use_cache=False).logits  # (rows, longest, vocabulary)
            for i, text, row in zip(rows, texts, logits, strict=True):
                head = len(encoded[i].prompt)
                scores = torch.log_softmax(row[head - 1 : len(text) - 1].float(), dim=-1)
                wanted = torch.tensor(text[head:], device=scores.device).unsqueeze(1)
                total = scores.gather(1, wanted).double().sum().item()
                result[i] = LogLikelihood(total, len(text) - head)
    return result
