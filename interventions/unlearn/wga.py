"""WGA: weighted gradient ascent (Wang et al., ICLR 2025, arXiv 2502.19301).

Gradient ascent grows without bound on tokens that are already unlikely, and there it damages the model most. Weighting
each token by its likelihood removes that part of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Updates, Weight
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.unlearn.kernels.predictions import Predictions


@dataclass(frozen=True)
class WgaSettings(TwoTerms):
    """WGA (Wang et al., 2025) with a loss on retain text; defaults as published."""

    name = "wga"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 1e-5
    epochs: Updates = 5
    accumulation: Count = 4
    weight_decay: Weight = 0.01
    beta: Weight = 1.0
    """Power of a token's likelihood in its weight; 0: gradient ascent."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make the likely tokens of `resources.forget` less likely, in place; preserve `resources.retain`."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood

        def losses(said: Predictions) -> Tensor:
            return wga_losses(said, self.beta)

        terms = Terms(lambda model, batches: losses, True, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)


def wga_losses(said: Predictions, beta: float) -> Tensor:
    """Return the mean over each text's tokens of p^beta log p, (texts,), with p^beta as a constant weight."""
    weight = (-beta * said.nll).exp().detach()
    return -said.mean(weight * said.nll)
