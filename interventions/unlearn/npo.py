"""NPO (Zhang et al., COLM 2024, arXiv 2404.05868) and SimNPO (Fan et al., 2024, arXiv 2410.07163).

Both push the likelihood of forget text down as preference optimisation does with a rejected answer: a text
whose likelihood is low already, against the model before (NPO) or outright (SimNPO), is pushed
less, where gradient ascent goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from interventions.step import Context
from interventions.types import Resources
from interventions.unlearn.likelihood import Terms, TextLosses, text_nll, train_on_likelihood
from interventions.unlearn.settings import NpoSettings, SimNpoSettings
from interventions.unlearn.texts import TextBatch


def npo(
    model: nn.Module, tokenizer: Any, settings: NpoSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make `resources.forget` less likely than the model finds it now, in place; hold `resources.retain`."""

    def prepare(model: nn.Module, batches: Sequence[TextBatch]) -> TextLosses:
        reference = reference_nll(model, batches)
        context.progress(f"npo: likelihood of {len(reference)} texts before the first update kept")

        def losses(nll: Tensor, batch: TextBatch) -> Tensor:
            return npo_losses(nll, reference[batch.which], settings.beta)

        return losses

    terms = Terms(prepare, False, settings.forget_weight, settings.retain_weight)
    return train_on_likelihood("npo", model, tokenizer, settings, resources, context, terms)


def simnpo(
    model: nn.Module, tokenizer: Any, settings: SimNpoSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make `resources.forget` unlikely by token, in place; hold `resources.retain`."""

    def prepare(model: nn.Module, batches: object) -> TextLosses:
        def losses(nll: Tensor, batch: TextBatch) -> Tensor:
            return simnpo_losses(nll, batch.scored, settings.beta, settings.gamma)

        return losses

    terms = Terms(prepare, False, settings.forget_weight, settings.retain_weight)
    return train_on_likelihood("simnpo", model, tokenizer, settings, resources, context, terms)


@torch.no_grad()
def reference_nll(model: nn.Module, batches: Sequence[TextBatch]) -> Tensor:
    """Return the negative log-likelihood of every text in `batches`, by its number, (texts,) float32."""
    found = [text_nll(model, batch) for batch in batches]
    which = torch.cat([batch.which for batch in batches])
    return torch.cat(found)[which.argsort()]


def npo_losses(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return NPO's loss of each text (equation 3), from its summed negative log-likelihoods now and before."""
    return -2.0 / beta * logsigmoid(beta * (nll - reference))


def simnpo_losses(nll: Tensor, tokens: Tensor, beta: float, gamma: float) -> Tensor:
    """Return SimNPO's loss of each text, from its summed negative log-likelihood and its number of tokens."""
    return -2.0 / beta * logsigmoid(beta * nll / tokens - gamma)
