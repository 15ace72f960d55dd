"""Greedy generation in batches: left padding, attention mask, KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from evaluators.encoding import check_length, encode, pad, padding_id
from evaluators.measurement import EvaluationError
from evaluators.passes import read, sequences
from evaluators.reading import generates, reading
from evaluators.state import borrowed
from interventions.tokens import Chat


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int] | int,
    batch_size: int = 32,
    *,
    chat: Chat | None = None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt; with `chat`, the answer to it in the chat template.

    A continuation ends before the first end-of-sequence token or after `max_new_tokens` (one number,
    or one per prompt). Of the model's generation config, only the end-of-sequence ids are used. Model
    and tokenizer are not changed.

    Raises EvaluationError for an empty prompt, a prompt that is too long, and NaN or infinite logits.
    """
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(budgets) != len(prompts):
        raise EvaluationError(f"max_new_tokens has {len(budgets)} numbers for {len(prompts)} prompts")
    return generate_from_ids(model, tokenizer, encode(tokenizer, prompts, chat), prompts, budgets, batch_size)


def generate_from_ids(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    prompts: Sequence[str],
    budgets: Sequence[int],
    batch_size: int,
) -> list[list[int]]:
    """Do the work of `greedy` for encoded prompts; errors show `prompts`."""
    if batch_size < 1:
        raise EvaluationError(f"batch_size is {batch_size}; it must be at least 1")
    for prompt, ids, budget in zip(prompts, encoded, budgets, strict=True):
        check_length(model, len(ids) + budget, f"prompt {prompt!r} with {budget} new tokens")
    continuations = continue_greedily(model, tokenizer, encoded, budgets, batch_size)
    for prompt, continuation in zip(prompts, continuations, strict=True):
        if continuation is None:
            raise EvaluationError(
                f"the model's logits after prompt {prompt!r} are NaN or infinite; its weights are broken"
            )
    return [ids for ids in continuations if ids is not None]


def continue_greedily(
    model: Any, tokenizer: Any, contexts: Sequence[list[int]], budgets: Sequence[int], batch_size: int
) -> list[list[int] | None]:
    """Return the greedy continuation of each context, see `greedy`; None for broken logits.

    If padding or the KV cache changes the model's logits (see `evaluators.reading`), each token comes
    from a full pass over contexts of equal length.
    """
    # Sorted by length for little padding; longest first, so that memory errors come early.
    order = sorted((i for i in range(len(contexts)) if budgets[i] > 0), key=lambda i: (-len(contexts[i]), -budgets[i]))
    stops, fill = stop_ids(model, tokenizer), padding_id(tokenizer)
    found: list[list[int] | None] = [[] for _ in contexts]
    if not order:
        return found
    with borrowed(model, tokenizer), generation_config(model):
        longest = max(len(contexts[i]) + budgets[i] for i in order)
        how = reading(model, fill, longest)
        at_once = how.padded and pads_in_generation(model, fill)
        groups = [order] if at_once else [list(g) for _, g in groupby(order, key=lambda i: len(contexts[i]))]
        size = sequences(batch_size, longest) if how.together else 1
        for rows in (group[start : start + size] for group in groups for start in range(0, len(group), size)):
            texts, most = [contexts[i] for i in rows], max(budgets[i] for i in rows)
            generated, recorder = (_generate if at_once else step_by_step)(model, texts, most, fill, stops)
            for i, ids, broken in zip(rows, generated, recorder.broken, strict=True):
                end = min(next((k for k, token in enumerate(ids) if token in stops), len(ids)), budgets[i])
                found[i] = None if broken <= min(end, budgets[i] - 1) else ids[:end]
    return found


def pads_in_generation(model: Any, fill: int) -> bool:
    """Return whether `generate` may batch contexts of different lengths, padded on the left."""

    def generate(rows: Sequence[Sequence[int]], new: int) -> tuple[torch.Tensor, torch.Tensor]:
        output = _call(model, rows, new, fill, (), output_logits=True, return_dict_in_generate=True)
        return output.sequences[:, -new:], torch.stack(output.logits, dim=1)

    with generation_config(model):
        return generates(model, fill, generate)


@contextmanager
def generation_config(model: Any, **settings: Any) -> Iterator[None]:
    """Replace the model's generation config, whose values `generate` would use as defaults."""
    own = model.generation_config
    model.generation_config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def step_by_step(
    model: Any,
    rows: Sequence[list[int]],
    new: int,
    fill: int,
    stops: Sequence[int],
    until: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
) -> tuple[list[list[int]], BrokenLogits]:
    """Generate up to `new` ids after each of `rows`, which have equal length, with a full pass per id.

    A text ends at one of `stops`, or where `until` returns True.
    """
    recorder, ended = BrokenLogits(len(rows), len(rows[0])), torch.zeros(len(rows), dtype=torch.bool)
    texts = torch.tensor(rows)
    for _ in range(new):
        logits = read(model, texts.tolist(), fill, 1)[:, -1].cpu()
        chosen = recorder(texts, logits).argmax(dim=-1)
        texts = torch.cat([texts, chosen.unsqueeze(1)], dim=1)
        ended |= torch.isin(chosen, torch.tensor(stops, dtype=torch.long))
        if until is not None:
            ended |= until(texts, logits)
        if bool(ended.all()):
            break
    return texts[:, len(rows[0]) :].tolist(), recorder


def _generate(
    model: Any, rows: Sequence[list[int]], new: int, fill: int, stops: Sequence[int]
) -> tuple[list[list[int]], BrokenLogits]:
    """Generate up to `new` ids after each of `rows` with left padding and the KV cache."""
    width = max(map(len, rows))
    recorder = BrokenLogits(len(rows), width)
    output = _call(model, rows, new, fill, stops, logits_processor=LogitsProcessorList([recorder]))
    return output[:, width:].tolist(), recorder


def _call(
    model: Any,
    rows: Sequence[Sequence[int]],
    new: int,
    fill: int,
    stops: Sequence[int],
    *,
    logits_processor: Any = None,
    **options: Any,
) -> Any:
    batch = pad(rows, "left", fill, model.device)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=new,
        use_cache=True,
        pad_token_id=fill,
        eos_token_id=list(stops) or None,
        **options,
    )
    return model.generate(**batch._asdict(), generation_config=config, logits_processor=logits_processor)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the end-of-sequence ids of the tokenizer and the model's generation config."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


class BrokenLogits(LogitsProcessor):
    """Record where each row first has NaN or infinite logits; argmax would silently pick a NaN."""

    def __init__(self, rows: int, width: int) -> None:
        self.broken: list[float] = [math.inf] * rows
        """Position of the first broken logits among the new tokens of each row; infinite if there are none."""
        self._width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # A logit may be -inf (a masked id), but not all of them, and none may be NaN or +inf.
        broken = (torch.isnan(scores) | torch.isposinf(scores)).any(dim=-1) | torch.isneginf(scores).all(dim=-1)
        for row in broken.nonzero().flatten().tolist():
            self.broken[row] = min(self.broken[row], input_ids.shape[1] - self._width)
        return torch.where(broken.unsqueeze(-1), torch.zeros_like(scores), scores)
