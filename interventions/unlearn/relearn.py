"""Relearning: an attack that recovers unlearned knowledge from the weights (Łucki et al., 2024, arXiv 2409.18025).

Fine-tunes briefly on a few of the forget texts. If knowledge returns that these texts do not contain, it was hidden,
not removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, Updates
from interventions.unlearn.bases import PartOfDepth, Trained


@dataclass(frozen=True)
class RelearnSettings(Trained):
    """Relearning attack on unlearning (Łucki et al., 2024): brief fine-tuning on a few of the forget texts."""

    name = "relearn"
    undoes = ("unlearn",)

    samples: Count | None = 10
    layer_fraction: PartOfDepth = 1.0
    epochs: Updates = 3

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Fine-tune the model on the first texts of each topic of `resources.forget`, in place."""
        from interventions.unlearn.kernels.likelihood import Terms, descend, train_on_likelihood

        return train_on_likelihood(model, tokenizer, self, resources, context, Terms(descend, by_token=True))
