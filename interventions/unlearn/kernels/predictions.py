"""What a model predicts for the tokens of texts, now or as it was before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from interventions.logits import logits_at
from interventions.unlearn.kernels.texts import TextBatch


@dataclass(frozen=True)
class Predictions:
    """The predictions of all tokens of a batch but the first of each text, one text after another."""

    logits: Tensor
    """(tokens, vocabulary) float32."""
    batch: TextBatch

    @property
    def _scored(self) -> Tensor:
        return self.batch.mask[:, 1:].bool()

    @property
    def targets(self) -> Tensor:
        """The tokens themselves, (tokens,) int64."""
        return self.batch.ids[:, 1:][self._scored]

    @property
    def places(self) -> Tensor:
        """The number of each token among those of its text, from 0, (tokens,) int64."""
        return self._scored.nonzero()[:, 1]

    @cached_property
    def nll(self) -> Tensor:
        """The negative log-likelihood of each token in nats, (tokens,)."""
        return cross_entropy(self.logits, self.targets, reduction="none")

    @property
    def text_nll(self) -> Tensor:
        """The negative log-likelihood of each text, summed over its tokens, (texts,)."""
        return self._by_text(self.nll)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (tokens,) over each text, (texts,)."""
        return self._by_text(values) / self.batch.scored

    def _by_text(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._scored.shape).masked_scatter(self._scored, values).sum(dim=1)


def predict(model: nn.Module, batch: TextBatch, weights: Mapping[str, Tensor] | None = None) -> Predictions:
    """Run the model on a batch, with `weights` in the place of the parameters that they name.

    No token sees the padding, which is on the right, so no mask is needed: without one, attention is faster.
    """
    found: Any = model
    arguments = {"input_ids": batch.ids, "use_cache": False}
    return Predictions(logits_at(model, found.get_output_embeddings(), arguments, *batch.predicting, weights), batch)


class Reference:
    """The model with the trained weights that it has now, whatever training does to them later."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def predict(self, batch: TextBatch) -> Predictions:
        """Return what the model said about a batch."""
        return predict(self._model, batch, self._weights)
