"""Greedy generation in batches: left padding, attention mask, KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from evaluators.encoding import check_length, encode, pad, padding_id
from evaluators.measurement import EvaluationError
from evaluators.state import borrowed


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int] | int,
    batch_size: int = 32,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, in the order of the prompts.

    The ids of a continuation end before the first end-of-sequence token and are at most
    `max_new_tokens` (one number, or one a prompt). The model's own generation config plays no part
    but for its end-of-sequence ids. Model and tokenizer are left as found.

    Raises EvaluationError for an empty prompt, a prompt that does not fit the model, and logits
    that are NaN or infinite.
    """
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(budgets) != len(prompts):
        raise EvaluationError(f"max_new_tokens has {len(budgets)} numbers for {len(prompts)} prompts")
    return go_on(model, tokenizer, encode(tokenizer, prompts), prompts, budgets, batch_size)


def go_on(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    prompts: Sequence[str],
    budgets: Sequence[int],
    batch_size: int,
) -> list[list[int]]:
    """Return what `greedy` does, after the ids `encoded`; errors name them by `prompts`."""
    if batch_size < 1:
        raise EvaluationError(f"batch_size is {batch_size}; it must be at least 1")
    for prompt, ids, budget in zip(prompts, encoded, budgets, strict=True):
        check_length(model, len(ids) + budget, f"prompt {prompt!r} with {budget} new tokens")

    # Similar lengths together, so that little is padded; longest first, so that memory runs out early.
    order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), -budgets[i]))
    stops = stop_ids(model, tokenizer)
    continuations: list[list[int]] = [[] for _ in prompts]
    with borrowed(model, tokenizer):
        # `generate` fills what it is not told from the model's own config: give it an empty one.
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(budgets[i] for i in rows)
            if longest < 1:
                continue
            batch = pad([encoded[i] for i in rows], "left", padding_id(tokenizer), model.device)
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=longest,
                    use_cache=True,
                    pad_token_id=padding_id(tokenizer),
                    eos_token_id=stops or None,
                ),
                logits_processor=LogitsProcessorList([RejectNonFinite([prompts[i] for i in rows])]),
            )
            width = batch.input_ids.shape[1]
            for i, ids in zip(rows, output[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(ids) if token in stops), len(ids))
                continuations[i] = ids[: min(end, budgets[i])]
    return continuations


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: the tokenizer's, and those of the model's generation config."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


class RejectNonFinite(LogitsProcessor):
    """Stop at logits that no choice can be made from; argmax would quietly pick a NaN."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # -inf is a fair logit (a masked word of the vocabulary), NaN and +inf are not.
        broken = (torch.isnan(scores) | torch.isposinf(scores)).any(dim=-1)
        if broken.any():
            prompt = self.prompts[int(broken.nonzero()[0])]
            raise EvaluationError(
                f"the model's logits after prompt {prompt!r} are NaN or infinite; its weights are broken"
            )
        return scores
