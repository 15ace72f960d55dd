"""Gradient difference: ascent on forget text, descent on retain text (Liu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Restraint
from interventions.unlearn.bases import TwoTerms


@dataclass(frozen=True)
class GdSettings(TwoTerms):
    """Gradient difference: ascent on forget text, descent on retain text (Liu et al., 2022).

    The default retain weight is from Kolbeinsson et al. (2025).
    """

    name = "gd"

    retain_weight: Restraint = 40.0
    """Weight of the loss on retain text; 0: gradient ascent only."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Maximise the loss on `resources.forget` and minimise it on `resources.retain`, in place."""
        from interventions.unlearn.kernels.likelihood import Terms, ascend, train_on_likelihood

        terms = Terms(ascend, True, self.forget_weight, self.retain_weight)
        return train_on_likelihood(model, tokenizer, self, resources, context, terms)
