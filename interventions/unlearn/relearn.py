"""Relearning: the attack that shows what unlearning left in the weights (Łucki et al., 2024, arXiv 2409.18025).

A short fine-tuning on a few of the texts that were to be forgotten. Where knowledge comes back that
those texts do not hold, it had been hidden, not removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count
from interventions.unlearn.bases import PartOfDepth, Trained


@dataclass(frozen=True)
class RelearnSettings(Trained):
    """The attack on unlearning: a short fine-tuning on a few of the texts that were to be forgotten."""

    name = "relearn"
    undoes = ("unlearn",)

    samples: Count | None = 10
    layer_fraction: PartOfDepth = 1.0
    epochs: Count = 3

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Fine-tune the model on the first texts of each topic of `resources.forget`, in place."""
        from interventions.unlearn.kernels.likelihood import Terms, nll_by_token, train_on_likelihood

        terms = Terms(lambda model, batches: nll_by_token, by_token=True)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)
