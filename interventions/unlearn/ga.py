"""Gradient ascent on forget text (Jang et al., ACL 2023, arXiv 2210.01504)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count
from interventions.unlearn.bases import Trained


@dataclass(frozen=True)
class GaSettings(Trained):
    """Gradient ascent on forget text (Jang et al., 2023); defaults as in Kolbeinsson et al. (2025)."""

    name = "ga"

    samples: Count | None = 25
    accumulation: Count = 2

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Maximise the mean negative log-likelihood per token of `resources.forget`, in place."""
        from interventions.unlearn.kernels.likelihood import Terms, ascend, train_on_likelihood

        return train_on_likelihood(model, tokenizer, self, resources, context, Terms(ascend, by_token=True))
