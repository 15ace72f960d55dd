"""EMMET: mass editing with equality constraints (Gupta et al., EMNLP Findings 2024, arXiv 2403.14236).

Like MEMIT, but every key of a batch must map to its target value exactly; among all updates that do so, EMMET takes
the one that changes the outputs of other keys least. With one edit, that is ROME's update.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from interventions.edit.bases import LayersRewriter
from interventions.intervention import Context, Model, Resources
from interventions.ranges import Fractions, Restraint


@dataclass(frozen=True)
class EmmetSettings(LayersRewriter):
    """EMMET (Gupta et al., 2024); defaults as published, the layer as a fraction of depth."""

    name = "emmet"

    layer_fractions: Fractions = field(default_factory=lambda: [0.16, 0.16])
    """First and last edited block as fractions of depth (block 5 of 32 as published)."""
    ridge: Restraint = 0.1
    """Added to the diagonal of K^T C^-1 K in batches of several edits, against edits with almost the same key; 0: the
    constraints hold exactly."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, preserving the keys of `resources.calibration`."""
        from interventions.edit.kernels.closed_form import emmet_update
        from interventions.edit.kernels.rewriting import rewrite, with_factor

        make_solve = with_factor(emmet_update, context, ridge=self.ridge)
        return rewrite(model, tokenizer, self, resources, context, make_solve, remedy="lower emmet.ridge")
