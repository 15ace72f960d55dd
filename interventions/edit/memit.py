"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.edit.bases import LayersRewriter
from interventions.intervention import Context, Model, Resources
from interventions.ranges import Positive

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.edit.kernels.rewriting import Solve
    from interventions.structure import Memory


@dataclass(frozen=True)
class MemitSettings(LayersRewriter):
    """MEMIT (Meng et al., 2023); defaults as published, layers as fractions of depth."""

    name = "memit"

    covariance_weight: Positive = 15000.0
    """Weight of preserving other keys, relative to the edits."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, preserving the keys of `resources.calibration`."""
        from functools import partial

        from interventions.edit.kernels.closed_form import memit_update
        from interventions.edit.kernels.rewriting import factorised, rewrite

        def make_solve(output: Memory, second_moment: Tensor) -> Solve:
            return partial(
                memit_update, stored=factorised(output, second_moment, context), weight=self.covariance_weight
            )

        return rewrite(model, tokenizer, self, resources, context, make_solve, remedy="lower memit.covariance_weight")
