"""Gradient difference: ascent on forget text, held against the likelihood of retain text (Liu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.ranges import Weight
from interventions.unlearn.bases import TwoTerms

if TYPE_CHECKING:
    from torch import nn

    from interventions.context import Context
    from interventions.types import Resources


@dataclass(frozen=True)
class GdSettings(TwoTerms):
    """Gradient difference: ascent on forget text, descent on retain text (Liu et al., 2022).

    Defaults with the retain weight of Kolbeinsson et al. (2025).
    """

    name = "gd"

    retain_weight: Weight = 40.0
    """Weight of the loss on retain text; 0: gradient ascent alone."""

    def run(self, model: nn.Module, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Maximise it for `resources.forget` and minimise it for `resources.retain`, in place."""
        from interventions.unlearn.kernels.likelihood import Terms, ascend, train_on_likelihood

        terms = Terms(ascend, True, self.forget_weight, self.retain_weight)
        return train_on_likelihood(self.name, model, tokenizer, self, resources, context, terms)
