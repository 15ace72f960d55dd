"""DPO (Rafailov et al., NeurIPS 2023, arXiv 2305.18290) and losses like it, by TRL's `DPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from interventions.intervention import Context, Model, Resources
from interventions.ranges import LARGER_IS_MILDER, Choice, LearningRate, Positive, Share
from interventions.tune.bases import Tuned

LOSSES = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "aot", "apo_zero", "apo_down")


@dataclass(frozen=True)
class DpoSettings(Tuned):
    """Direct preference optimisation (Rafailov et al., 2023; TRL), against the model before the step."""

    name = "dpo"

    lr: LearningRate = 1e-6
    beta: Annotated[Positive, LARGER_IS_MILDER] = 0.1
    """How strongly the model is kept near the one before the step."""
    loss: Annotated[str, Choice(*LOSSES)] = "sigmoid"
    """TRL's `loss_type`; sigmoid is DPO as published."""
    label_smoothing: Share = 0.0
    """Share of preferences that are taken to be the wrong way round."""

    def aims_at(self, metric: str) -> bool:
        """Say whether a metric is about preferences."""
        return metric == "preference_wins"

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Train on `resources.preferences`, in place, and return their number and the losses."""
        from interventions.tune.kernels.rows import preference_rows
        from interventions.tune.kernels.training import train

        rows = preference_rows(self, tokenizer, resources.preferences)
        options = {"beta": self.beta, "loss_type": [self.loss], "label_smoothing": self.label_smoothing}
        details = train(self, "DPO", model, tokenizer, rows, context, options)
        return {"preferences": len(rows), **details}
