"""SimNPO: NPO without the original model as a reference (Fan et al., 2024, arXiv 2410.07163); see `npo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Positive, Strength, Updates, Weight
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.unlearn.kernels.likelihood import TextLosses
    from interventions.unlearn.kernels.predictions import Predictions


@dataclass(frozen=True)
class SimNpoSettings(TwoTerms):
    """SimNPO (Fan et al., 2024) with a loss on retain text; defaults as published."""

    name = "simnpo"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 1e-5
    epochs: Updates = 10
    accumulation: Count = 8
    weight_decay: Weight = 0.01
    beta: Positive = 2.5
    gamma: Weight = 0.0
    """Margin: larger values make texts less likely before the loss flattens."""
    forget_weight: Strength = 0.1375

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.forget` less likely per token, in place; preserve `resources.retain`."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood
        from interventions.unlearn.kernels.preference import simnpo_losses

        def prepare(model: nn.Module, batches: object) -> TextLosses:
            def losses(said: Predictions) -> Tensor:
                return simnpo_losses(said.text_nll, said.batch.scored, self.beta, self.gamma)

            return losses

        terms = Terms(prepare, False, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)
