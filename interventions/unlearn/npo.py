"""NPO (Zhang et al., COLM 2024, arXiv 2404.05868) and SimNPO (Fan et al., 2024, arXiv 2410.07163).

Both treat forget text as the rejected answer of preference optimisation. The loss flattens for texts that are already
unlikely, relative to the original model (NPO) or absolutely (SimNPO), where gradient ascent would continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Positive, Updates, Weight
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.unlearn.kernels.likelihood import TextLosses
    from interventions.unlearn.kernels.predictions import Predictions
    from interventions.unlearn.kernels.texts import TextBatch


@dataclass(frozen=True)
class NpoSettings(TwoTerms):
    """NPO (Zhang et al., 2024) with a loss on retain text; defaults as published."""

    name = "npo"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 1e-5
    epochs: Updates = 10
    accumulation: Count = 8
    weight_decay: Weight = 0.01
    beta: Positive = 0.1
    """Inverse temperature: smaller is closer to gradient ascent."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.forget` less likely than for the original model, in place; preserve `resources.retain`."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood
        from interventions.unlearn.kernels.preference import npo_losses, reference_nll

        def prepare(model: nn.Module, batches: Sequence[TextBatch]) -> TextLosses:
            reference = reference_nll(model, batches)
            context.progress(f"npo: recorded the likelihood of {len(reference)} texts before the first update")

            def losses(said: Predictions) -> Tensor:
                return npo_losses(said.text_nll, reference[said.batch.which], self.beta)

            return losses

        terms = Terms(prepare, False, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)
