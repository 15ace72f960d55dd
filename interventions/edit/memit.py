"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.edit.bases import LayersRewriter
from interventions.ranges import Positive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.context import Context
    from interventions.edit.kernels.rewriting import Solve
    from interventions.structure import Linear
    from interventions.types import Resources


@dataclass(frozen=True)
class MemitSettings(LayersRewriter):
    """MEMIT (Meng et al., 2023); defaults as published, layers as fractions of depth."""

    name = "memit"

    covariance_weight: Positive = 15000.0
    """How much what is stored weighs against the edits."""

    def run(self, model: nn.Module, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, weighing them against the keys of `resources.calibration`."""
        from functools import partial

        from interventions.edit.kernels.closed_form import factorise, memit_update
        from interventions.edit.kernels.rewriting import rewrite

        def make_solve(output: Linear, second_moment: Tensor) -> Solve:
            stored = factorise(second_moment)
            if stored.ridge:
                context.warn(f"{output.parameter_name}: singular second moment, solved with a ridge of {stored.ridge}")
            return partial(memit_update, stored=stored, weight=self.covariance_weight)

        return rewrite(
            model,
            tokenizer,
            self,
            resources,
            context,
            method=self.name,
            choose_layers=self.choose_layers,
            make_solve=make_solve,
            remedy="lower memit.covariance_weight",
        )
