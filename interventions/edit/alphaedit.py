"""AlphaEdit: editing in the null space of what is stored (Fang et al., ICLR 2025, arXiv 2410.02355).

As MEMIT, but instead of weighing edits against the keys of other text, an update is confined to the
directions in which those keys hardly reach. Keys of earlier batches keep what they were made to yield.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.edit.bases import LayersRewriter
from interventions.intervention import Context, Model, Resources
from interventions.ranges import Positive

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.edit.kernels.rewriting import Solve
    from interventions.structure import Linear


@dataclass(frozen=True)
class AlphaEditSettings(LayersRewriter):
    """AlphaEdit (Fang et al., 2025); defaults as published, layers as fractions of depth."""

    name = "alphaedit"

    nullspace_threshold: Positive = 0.02
    """Directions in which the second moment of the keys is below this are free for edits."""
    nullspace_relative: bool = False
    """Take the threshold as a multiple of the mean eigenvalue: for models whose keys are of another scale."""
    ridge: Positive = 10.0
    """Weight of the update's own size (called L2 by the authors)."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place; `resources.calibration` gives the keys whose outputs stay.

        The details have, besides MEMIT's, the share of each layer's directions that were free.
        """
        from interventions.edit.kernels.closed_form import NullSpaceSolve, null_space
        from interventions.edit.kernels.rewriting import rewrite
        from interventions.types import InterventionError

        free: dict[str, float] = {}

        def make_solve(output: Linear, second_moment: Tensor) -> Solve:
            try:
                basis = null_space(second_moment, self.nullspace_threshold, relative=self.nullspace_relative)
            except InterventionError as error:
                raise InterventionError(f"alphaedit: {output.parameter_name}: {error}") from None
            free[output.parameter_name] = basis.shape[1] / basis.shape[0]
            if basis.shape[1] == basis.shape[0]:
                context.warn(
                    f"{output.parameter_name}: every direction is below nullspace_threshold="
                    f"{self.nullspace_threshold}, so nothing is kept; lower it"
                )
            return NullSpaceSolve(basis, self.ridge)

        remedy = "lower alphaedit.ridge or raise alphaedit.nullspace_threshold"
        details = rewrite(model, tokenizer, self, resources, context, make_solve, remedy=remedy)
        return {**details, "free_directions": free}
