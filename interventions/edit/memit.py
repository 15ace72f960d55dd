"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from interventions.edit.bases import LayersRewriter
from interventions.intervention import Context, Model, Resources
from interventions.ranges import LARGER_IS_MILDER, Positive


@dataclass(frozen=True)
class MemitSettings(LayersRewriter):
    """MEMIT (Meng et al., 2023); defaults as published, layers as fractions of depth."""

    name = "memit"

    covariance_weight: Annotated[Positive, LARGER_IS_MILDER] = 15000.0
    """Weight of preserving other keys, relative to the edits."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, preserving the keys of `resources.calibration`."""
        from interventions.edit.kernels.closed_form import memit_update
        from interventions.edit.kernels.rewriting import rewrite, with_factor

        make_solve = with_factor(memit_update, context, weight=self.covariance_weight)
        return rewrite(model, tokenizer, self, resources, context, make_solve, remedy="lower memit.covariance_weight")
