"""Relearning: the attack that shows what unlearning left in the weights (Łucki et al., 2024, arXiv 2409.18025).

A short fine-tuning on a few of the texts that were to be forgotten. Where knowledge comes back that
those texts do not hold, it had been hidden, not removed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from interventions.step import Context
from interventions.types import Resources
from interventions.unlearn.likelihood import Terms, nll_by_token, train_on_likelihood
from interventions.unlearn.settings import RelearnSettings


def relearn(
    model: nn.Module, tokenizer: Any, settings: RelearnSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Fine-tune the model on the first texts of each topic of `resources.forget`, in place."""
    terms = Terms(lambda model, batches: nll_by_token, by_token=True)
    return train_on_likelihood("relearn", model, tokenizer, settings, resources, context, terms)
