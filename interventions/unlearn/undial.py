"""UNDIAL: self-distillation with adjusted logits (Dong et al., NAACL 2025, arXiv 2402.10052).

The original model is the teacher, but with a lower logit for the token that the forget text has. The loss has a
minimum, unlike that of gradient ascent, so that training cannot diverge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Positive, Restraint, Updates, Weight
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.unlearn.kernels.likelihood import TextLosses
    from interventions.unlearn.kernels.predictions import Predictions
    from interventions.unlearn.kernels.texts import TextBatch


@dataclass(frozen=True)
class UndialSettings(TwoTerms):
    """UNDIAL (Dong et al., 2025), as published without a loss on retain text; other defaults as published."""

    name = "undial"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 1e-4
    epochs: Updates = 10
    accumulation: Count = 8
    weight_decay: Weight = 0.01
    beta: Positive = 10.0
    """How much lower the teacher's logit of the text's own token is."""
    retain_weight: Restraint = 0.0
    """Weight of the loss on retain text; 0: train on forget text only."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Teach the model its own predictions of `resources.forget` without the tokens that are there, in place."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood
        from interventions.unlearn.kernels.predictions import Reference

        def prepare(model: nn.Module, batches: Sequence[TextBatch]) -> TextLosses:
            teacher = Reference(model)
            return lambda said: undial_losses(said, teacher.predict(said.batch), self.beta)

        terms = Terms(prepare, True, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)


def undial_losses(said: Predictions, teacher: Predictions, beta: float) -> Tensor:
    """Return the mean cross-entropy of each text's tokens with softmax(z - beta e), (texts,).

    z are the teacher's logits, and e is one at the text's own token.
    """
    own = said.targets[:, None]
    adjusted = teacher.logits.scatter(1, own, teacher.logits.gather(1, own) - beta)
    return -said.mean((adjusted.softmax(dim=1) * said.logits.log_softmax(dim=1)).sum(dim=1))
