"""What a model learnt from tuning: its loss and its answers on held-out examples, and its preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evaluators.answers import Likelihood
from evaluators.continuations import score
from evaluators.data import EvaluationData
from evaluators.encoding import check_length, encode_pairs, meaningless_ids, padding_id
from evaluators.measurement import EvaluationError, Measurement
from evaluators.recall import exact, said
from evaluators.settings import NoSettings
from evaluators.state import borrowed
from interventions.tokens import Chat
from interventions.types import Example, Preference

_ROUNDING = 1e-4
"""Nats by which a margin must differ: less may be rounding."""


def evaluate(model: Any, tokenizer: Any, settings: NoSettings, data: EvaluationData) -> list[Measurement]:
    """Measure each set of held-out examples, and the held-out preferences if the base model's margins are known."""
    found: list[Measurement] = []
    size, chat = data.batch_size, data.chat
    for name, examples in data.tuning.sets.items():
        found += measure_tuning(model, tokenizer, name, examples, batch_size=size, chat=chat)
    if data.tuning.preferences and data.unedited is not None and data.unedited.margins:
        margins = preference_margins(model, tokenizer, data.tuning.preferences, batch_size=size, chat=chat)
        found.append(preference_wins(margins, data.unedited.margins))
    return found


def measure_tuning(
    model: Any,
    tokenizer: Any,
    name: str,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    chat: Chat | None = None,
) -> list[Measurement]:
    """Measure `tuning_loss/NAME`, in nats per token of the answers, and `tuning_recall/NAME`.

    Recall is the share of examples whose greedy answer is exactly right. Conversations are asked in the chat template;
    with `chat`, plain prompts are too. Raises EvaluationError for no examples, for an answer without tokens, and for a
    text that is too long.
    """
    texts = [(example, example.answer) for example in examples]
    found = _scored(model, tokenizer, texts, f"example of {name}", batch_size, chat)
    note = "answers after their prompts"
    tokens = [one.scored.tokens for one in found]
    losses = [-one.scored.total / one.scored.tokens for one in found]
    answers = [said(tokenizer, one) for one in found]
    return [
        Measurement.mean(f"tuning_loss/{name}", losses, higher_is_better=False, note=note, weights=tokens),
        Measurement.mean(
            f"tuning_recall/{name}", list(map(exact, found)), note="greedy, exact token sequence", answers=answers
        ),
    ]


def preference_margins(
    model: Any,
    tokenizer: Any,
    preferences: Sequence[Preference],
    *,
    batch_size: int = 32,
    chat: Chat | None = None,
) -> tuple[float, ...]:
    """Return log p(chosen) - log p(rejected) of each preference, in nats; errors as `measure_tuning`."""
    sides = [[(one, getattr(one, side)) for one in preferences] for side in ("chosen", "rejected")]
    found = _scored(model, tokenizer, [*sides[0], *sides[1]], "preference", batch_size, chat)
    totals = [one.scored.total for one in found]
    return tuple(a - b for a, b in zip(totals[: len(preferences)], totals[len(preferences) :], strict=True))


def preference_wins(margins: Sequence[float], before: Sequence[float]) -> Measurement:
    """Return `preference_wins`: the share of preferences whose margin is above that of the base model."""
    gains = [now - then for now, then in zip(margins, before, strict=True)]
    wins = [math.nan if math.isnan(gain) else float(gain > _ROUNDING) for gain in gains]
    mean = sum(gains) / max(1, len(gains))
    return Measurement.mean("preference_wins", wins, note=f"mean gain of the margin: {mean:.3g} nats")


def _scored(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[Example | Preference, str]],
    what: str,
    batch_size: int,
    chat: Chat | None,
) -> list[Likelihood]:
    """Score an answer to each prompt."""
    pairs = []
    ignored = meaningless_ids(tokenizer)
    for number, (asked, answer) in enumerate(texts):
        (pair,) = encode_pairs(tokenizer, [(asked.prompt, answer)], _chat(asked, chat))
        if ignored.issuperset(pair.target):
            raise EvaluationError(f"{what} {number}: the answer {answer!r} to {asked.prompt!r} has no tokens")
        check_length(model, len(pair.prompt) + len(pair.target), f"{what} {number}: {asked.prompt!r}")
        pairs.append(pair)
    with borrowed(model, tokenizer):
        found = score(model, pairs, fill=padding_id(tokenizer), rows=batch_size)
    return [Likelihood(pair.target, scored) for pair, scored in zip(pairs, found, strict=True)]


def _chat(asked: Example | Preference, chat: Chat | None) -> Chat | None:
    """Return how the chat template writes what is asked; `chat` is that of plain prompts."""
    if not asked.chat:
        return chat
    return Chat(asked.system, {} if chat is None else chat.arguments, asked.earlier)
