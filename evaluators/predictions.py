"""Next-token distributions of the base model over running text, and how far those of a state are from them.

Logits of a whole text do not fit in memory (49,152 numbers per token of SmolLM2, 800 MB for 4,096 tokens), so what is
kept is the input of the output layer (576 numbers). A pass over a single token, in which that layer gets the kept
input instead of its own, turns it into the same logits, to the last bit. This is tested on the first batch; where a
model's code does not allow it, logits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluators.measurement import EvaluationError, Measurement
from evaluators.passes import run_once

LIMIT = 2**30
"""Bytes to keep; texts beyond are not compared. With 576 float32 numbers per token, it is reached at 466,000 tokens."""
_CHUNK = 2**19
"""Logits to compare at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for the windows of a text; everything is kept in the memory of the CPU."""

    rows: list[list[int]]
    """The ids of each window."""
    kept: list[Tensor]
    """Input of the output layer, or logits, for each of the first windows."""
    head: dict[str, Tensor] | None
    """Parameters of the output layer; None: `kept` are logits."""
    perplexity: Measurement
    """Of the model itself, from the same pass."""
    context: int
    """Tokens at the start of each window that are not scored."""

    def of_itself(self) -> list[Difference]:
        """Return how far the model is from itself, window by window: not at all."""
        return [Difference(0.0, 1.0, len(row) - self.context) for row in self.rows[: len(self.kept)]]


class Difference(NamedTuple):
    """How far the distributions of a window are from the base model's."""

    kl: float
    """Mean over its tokens of KL(base || state), in nats."""
    agreement: float
    """Share of its tokens for which both find the same id most likely."""
    tokens: int


class Recorder:
    """Keeps the predictions of a model, as the observer of a pass over text (see `evaluators.perplexity`)."""

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, _head(model)
        self._rows: list[list[int]] = []
        self._kept: list[Tensor] = []
        self._bytes = self._context = 0
        self._input: Tensor | None = None
        self._replays: bool | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the output layer gets."""
        if self._head is None:
            yield
            return
        handle = self._head.register_forward_pre_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, batch: list[list[int]], logits: Tensor, context: int) -> None:
        complete = len(self._kept) == len(self._rows)
        self._rows += batch
        self._context = context
        if self._replays is None:
            self._replays = self._can_replay(logits)
        found = self._input if self._replays else logits
        assert found is not None
        self._bytes += found.nbytes
        if complete and (self._bytes <= LIMIT or not self._kept):
            self._kept += found.cpu()

    def predictions(self, perplexity: Measurement) -> Predictions:
        """Return what was kept of the pass that found `perplexity`."""
        parameters = self._head.named_parameters() if self._replays else ()
        head = {name: value.detach().cpu().clone() for name, value in parameters}
        return Predictions(self._rows, self._kept, head if self._replays else None, perplexity, self._context)

    def _note(self, module: Any, given: tuple[Any, ...]) -> None:
        self._input = given[0]

    def _can_replay(self, logits: Tensor) -> bool:
        if self._input is None:
            return False
        given = self._input
        try:
            return torch.equal(_replayed(self._model, self._head, given), logits)
        except Exception:  # architectures raise different errors; for any of them, logits are kept
            return False
        finally:
            self._input = given


class Comparison:
    """Compares a model with the predictions of the base model, as the observer of a pass over the same text."""

    def __init__(self, model: Any, base: Predictions) -> None:
        self._model, self._base = model, base
        self._seen = 0
        self.windows: list[Difference] = []
        """The compared windows."""
        self._other: list[tuple[Any, Tensor]] = []
        if base.head is not None:
            own = dict(_head(model).named_parameters())
            self._other = [(own[name], value) for name, value in base.head.items() if not _same(own[name], value)]

    def __call__(self, batch: list[list[int]], logits: Tensor, context: int) -> None:
        """Compare a batch of windows; raises EvaluationError for another text and another vocabulary."""
        chosen = slice(self._seen, self._seen + len(batch))
        self._seen = chosen.stop
        if batch != self._base.rows[chosen]:
            raise EvaluationError("the text has other tokens than for the base model; do the tokenizers differ?")
        if not (kept := self._base.kept[chosen]):
            return
        before = self._logits_of_base(torch.stack(kept)).to(logits.device)
        if before.shape != logits.shape:
            raise EvaluationError(
                f"a vocabulary of {logits.shape[-1]} ids cannot be compared with the base model's {before.shape[-1]}"
            )
        place = slice(context - 1, -1)
        pairs = zip(before[:, place], logits[:, place], strict=True)
        found = torch.stack([_difference(one, other) for one, other in pairs])
        tokens = logits.shape[1] - context
        self.windows += [Difference(kl, agreement, tokens) for kl, agreement in found.tolist()]

    def _logits_of_base(self, kept: Tensor) -> Tensor:
        if self._base.head is None:
            return kept
        own = [parameter.data for parameter, _ in self._other]
        try:
            for parameter, value in self._other:
                parameter.data = value.to(parameter.device)
            return _replayed(self._model, _head(self._model), kept)
        finally:
            for (parameter, _), value in zip(self._other, own, strict=True):
                parameter.data = value


def _difference(base: Tensor, state: Tensor) -> Tensor:
    """Return mean KL(base || state) and agreement of the logits (tokens, vocabulary) of a window, in float64."""
    size = max(1, _CHUNK // base.shape[-1])
    parts = zip(torch.split(base, size), torch.split(state, size), strict=True)
    return torch.cat([_by_token(one, other) for one, other in parts]).mean(dim=0)


def _by_token(base: Tensor, state: Tensor) -> Tensor:
    """Return KL and agreement of each token, (tokens, 2)."""
    before, after = torch.log_softmax(base.float(), dim=-1), torch.log_softmax(state.float(), dim=-1)
    lost = after.neg_().add_(before)  # in place, which takes half the time
    if before.amin() == -torch.inf:  # an id that the base model excludes: 0 * log 0 is 0
        lost.masked_fill_(before == -torch.inf, 0.0)
    kl = before.exp_().mul_(lost).sum(dim=-1, dtype=torch.float64).clamp(min=0)  # rounding may leave less than nothing
    same = (base.argmax(dim=-1) == state.argmax(dim=-1)).double()
    return torch.stack([kl, torch.where(kl.isnan(), torch.nan, same)], dim=1)


def _replayed(model: Any, head: Any, given: Tensor) -> Tensor:
    """Return the logits that `model` makes of `given`, the input of its output layer."""
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    handle = head.register_forward_pre_hook(lambda module, own: (given.to(own[0].device), *own[1:]))
    try:
        logits: Tensor = run_once(model, ids).logits
    finally:
        handle.remove()
    return logits


def _head(model: Any) -> Any:
    """Return the output layer of `model`, None if it has no such module."""
    return model.get_output_embeddings()


def _same(parameter: Tensor, value: Tensor) -> bool:
    return torch.equal(parameter.detach().cpu(), value)
