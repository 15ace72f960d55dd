"""The losses of NPO and SimNPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from interventions.unlearn.kernels.predictions import predict
from interventions.unlearn.kernels.texts import TextBatch


@torch.no_grad()
def reference_nll(model: nn.Module, batches: Sequence[TextBatch]) -> Tensor:
    """Return the negative log-likelihood of every text in `batches`, by index, (texts,) float32."""
    found = [predict(model, batch).text_nll for batch in batches]
    which = torch.cat([batch.which for batch in batches])
    return torch.cat(found)[which.argsort()]


def npo_losses(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return NPO's loss of each text (equation 3), from its summed negative log-likelihoods now and before training."""
    return -2.0 / beta * logsigmoid(beta * (nll - reference))


def simnpo_losses(nll: Tensor, tokens: Tensor, beta: float, gamma: float) -> Tensor:
    """Return SimNPO's loss of each text, from its summed negative log-likelihood and its number of tokens."""
    return -2.0 / beta * logsigmoid(beta * nll / tokens - gamma)
