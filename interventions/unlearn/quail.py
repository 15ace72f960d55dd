"""QUAIL: unlearning that quantisation does not undo (Mishra and Mehreen, 2026, arXiv 2601.15538).

Gradient difference with a hinge in logit space: on forget text, logits must differ from the original model's by at
least half a quantisation step, so that what quantisation rounds away is less than what unlearning changed.

This follows the abstract, which leaves open what the step is of and which logits must differ how. Here, the step is
that of an integer grid over the range of the original model's logits at the token. The logit that counts is that of the
text's own token, relative to the mean of all logits, and it must fall: shifting all logits alike changes no
prediction, and an absolute difference has no gradient at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, LearningRate, Range, Strength, Updates
from interventions.unlearn.bases import PartOfDepth, TwoTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.unlearn.kernels.likelihood import TextLosses
    from interventions.unlearn.kernels.predictions import Predictions
    from interventions.unlearn.kernels.texts import TextBatch


@dataclass(frozen=True)
class QuailSettings(TwoTerms):
    """QUAIL (Mishra and Mehreen, 2026): gradient difference with a margin against quantisation."""

    name = "quail"

    layer_fraction: PartOfDepth = 1.0
    lr: LearningRate = 1e-5
    epochs: Updates = 5
    accumulation: Count = 4
    bits: Annotated[int, Range(2, 8)] = 4
    """The margin is half a step of a grid with this many bits."""
    hinge_weight: Strength = 1.0
    """Weight of the hinge, relative to that of gradient ascent; 0: gradient difference."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.forget` less likely, by a margin, in place; preserve `resources.retain`."""
        from interventions.unlearn.kernels.likelihood import Terms, train_on_likelihood
        from interventions.unlearn.kernels.predictions import Reference

        def prepare(model: nn.Module, batches: Sequence[TextBatch]) -> TextLosses:
            original = Reference(model)
            return lambda said: quail_losses(said, original.predict(said.batch), self.bits, self.hinge_weight)

        terms = Terms(prepare, True, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)


def quail_losses(said: Predictions, original: Predictions, bits: int, weight: float) -> Tensor:
    """Return the mean over each text's tokens of log p + weight * max(0, margin - fall of the logit), (texts,)."""
    margin = (original.logits.amax(dim=1) - original.logits.amin(dim=1)) / (2**bits - 1) / 2
    fall = _standing(original) - _standing(said)
    return said.mean(weight * (margin - fall).relu() - said.nll)


def _standing(said: Predictions) -> Tensor:
    """Return the logits of the texts' own tokens, relative to the mean of all logits, (tokens,)."""
    return said.logits.gather(1, said.targets[:, None])[:, 0] - said.logits.mean(dim=1)
