"""Gradient ascent (Jang et al., 2023, arXiv 2210.01504), gradient difference (Liu et al., 2022, arXiv 2203.12817).

Ascent makes the tokens of forget text less likely without bound; difference holds it against the
likelihood of retain text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from interventions.step import Context
from interventions.types import Resources
from interventions.unlearn.likelihood import Terms, TextLosses, nll_by_token, train_on_likelihood
from interventions.unlearn.settings import GaSettings, GdSettings
from interventions.unlearn.texts import TextBatch


def ga(
    model: nn.Module, tokenizer: Any, settings: GaSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Maximise the mean negative log-likelihood a token of `resources.forget`, in place."""
    return train_on_likelihood("ga", model, tokenizer, settings, resources, context, Terms(_ascend, by_token=True))


def gd(
    model: nn.Module, tokenizer: Any, settings: GdSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Maximise it for `resources.forget` and minimise it for `resources.retain`, in place."""
    terms = Terms(_ascend, True, settings.forget_weight, settings.retain_weight)
    return train_on_likelihood("gd", model, tokenizer, settings, resources, context, terms)


def _ascend(model: nn.Module, batches: object) -> TextLosses:
    def losses(nll: Tensor, batch: TextBatch) -> Tensor:
        return -nll_by_token(nll, batch)

    return losses
