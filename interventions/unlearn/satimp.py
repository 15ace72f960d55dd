"""SatImp: gradient ascent weighted by saturation and importance (Yang et al., ICML 2025, arXiv 2505.11953).

Saturation gives weight to tokens that are not yet forgotten, as WGA does; importance gives weight to tokens that are
not certain anyway, as the words that carry grammar are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Restraint, Updates, Weight
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.unlearn.kernels.predictions import Predictions


@dataclass(frozen=True)
class SatImpSettings(TwoTerms):
    """SatImp (Yang et al., 2025) with a loss on retain text; defaults as published."""

    name = "satimp"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 1e-5
    epochs: Updates = 5
    accumulation: Count = 4
    weight_decay: Weight = 0.01
    retain_weight: Restraint = 0.1
    """Weight of the loss on retain text; 0: train on forget text only."""
    saturation: Weight = 5.0
    """Power of a token's likelihood p in its weight (beta1)."""
    importance: Weight = 1.0
    """Power of 1 - p in its weight (beta2)."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make the tokens of `resources.forget` that weigh most less likely, in place; preserve `resources.retain`."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood

        def losses(said: Predictions) -> Tensor:
            return satimp_losses(said, self.saturation, self.importance)

        terms = Terms(lambda model, batches: losses, True, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)


def satimp_losses(said: Predictions, saturation: float, importance: float) -> Tensor:
    """Return the mean over each text's tokens of p^saturation (1 - p)^importance log p, (texts,).

    The weights of log p are constants.
    """
    p = (-said.nll).exp().detach()
    return -said.mean(p**saturation * (1 - p) ** importance * said.nll)
