"""Choose, tokenise and batch the texts of unlearning methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from interventions.names import near_names
from interventions.padding import pad_right, padding_id
from interventions.structure import within_context
from interventions.types import InterventionError

Rows = list[list[int]]


@dataclass(frozen=True)
class TextBatch:
    """A batch of texts, padded on the right."""

    ids: Tensor
    """(texts, longest) int64."""
    mask: Tensor
    """(texts, longest) int64: 1 for tokens, 0 for padding."""
    which: Tensor
    """(texts,) int64: their indices among all texts."""

    @property
    def scored(self) -> Tensor:
        """The tokens that have a likelihood: all but the first of each text, (texts,)."""
        return self.mask.sum(dim=1) - 1

    @cached_property
    def predicting(self) -> tuple[Tensor, Tensor]:
        """Rows and positions of the tokens that predict another one: all but the last of each text."""
        rows, places = self.mask[:, 1:].nonzero().unbind(1)
        return rows, places


def choose_topics(
    method: str, topics: Sequence[str] | None, forget: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Return the forget texts of the chosen topics.

    Raises InterventionError for no topic, one that there is no text of (with near names), and one without texts.
    """
    if not forget:
        raise InterventionError(f"{method} needs forget text by topic; none was given (resources.forget)")
    chosen = {}
    for topic in topics if topics is not None else forget:
        if topic not in forget:
            raise InterventionError(
                f"{method}.topics: no forget text of {topic!r}.{near_names(topic, forget)} Known: {', '.join(forget)}."
            )
        if isinstance(forget[topic], str):
            raise InterventionError(
                f"{method}: the forget texts of {topic!r} must be a sequence of texts, not one text"
            )
        if not forget[topic]:
            raise InterventionError(
                f"{method}: the forget set of topic {topic!r} is empty; give it texts or leave it out"
            )
        chosen[topic] = forget[topic]
    return chosen


def tokenise(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int, source: str) -> Rows:
    """Return the token ids of each text, truncated to `max_tokens` and to the model's context.

    `source` says in errors whose texts these are. Raises InterventionError, naming the text, for one
    without a token to predict.
    """
    if isinstance(texts, str):
        raise InterventionError(f"{source} must be a sequence of texts, not one text")
    limit = within_context(model, max_tokens)
    rows = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"] if text.strip() else []
        if len(ids) < 2:
            raise InterventionError(f"{source}, text {number}: {text[:40]!r} has nothing to predict; remove it")
        rows.append(ids[:limit])
    return rows


def make_batches(rows: Rows, batch_size: int, tokenizer: Any, device: torch.device) -> list[TextBatch]:
    """Batch texts of similar length to reduce padding, shortest first."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # stable: the same in every run
    batches = []
    for start in range(0, len(order), batch_size):
        which = order[start : start + batch_size]
        ids, mask = pad_right([rows[number] for number in which], padding_id(tokenizer), device)
        batches.append(TextBatch(ids, mask, torch.tensor(which, device=device)))
    return batches


def shuffled(batches: Sequence[TextBatch], generator: torch.Generator) -> list[TextBatch]:
    """Return the batches in random order."""
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def endless(batches: Sequence[TextBatch], generator: torch.Generator) -> Iterator[TextBatch]:
    """Yield the batches in random order, again and again."""
    for _ in count():
        yield from shuffled(batches, generator)
