"""AlphaEdit: editing in the null space of the preserved keys (Fang et al., ICLR 2025, arXiv 2410.02355).

Like MEMIT, but updates are restricted to directions in which the keys of other text are close to zero. The outputs of
keys from earlier batches are preserved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.edit.bases import LayersRewriter
from interventions.intervention import Context, Model, Resources
from interventions.ranges import LARGER_IS_MILDER, SMALLER_IS_MILDER, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.edit.kernels.rewriting import Solve
    from interventions.structure import Memory


@dataclass(frozen=True)
class AlphaEditSettings(LayersRewriter):
    """AlphaEdit (Fang et al., 2025); defaults as published, layers as fractions of depth."""

    name = "alphaedit"

    nullspace_threshold: Annotated[Positive, SMALLER_IS_MILDER] = 0.02
    """Edits use directions in which the second moment of the keys is below this."""
    nullspace_relative: bool = False
    """Threshold as a multiple of the mean eigenvalue, for models whose keys have another scale."""
    ridge: Annotated[Positive, LARGER_IS_MILDER] = 10.0
    """Weight of the penalty on the update's norm (called L2 by the authors)."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, preserving the outputs of the keys of `resources.calibration`.

        The details also have the share of directions used for edits, by layer.
        """
        from interventions.edit.kernels.closed_form import NullSpaceSolve, free_share, null_space
        from interventions.edit.kernels.rewriting import rewrite
        from interventions.types import InterventionError

        free: dict[str, float] = {}

        def make_solve(output: Memory, second_moment: Tensor) -> Solve:
            try:
                basis = null_space(second_moment, self.nullspace_threshold, relative=self.nullspace_relative)
            except InterventionError as error:
                raise InterventionError(f"alphaedit: {output.parameter_name}: {error}") from None
            share = free[output.parameter_name] = free_share(basis)
            if share == 1:
                context.warn(
                    f"{output.parameter_name}: every direction is below nullspace_threshold="
                    f"{self.nullspace_threshold}, so no key is preserved; lower it"
                )
            return NullSpaceSolve(basis, self.ridge)

        remedy = "lower alphaedit.ridge or raise alphaedit.nullspace_threshold"
        details = rewrite(model, tokenizer, self, resources, context, make_solve, remedy=remedy)
        return {**details, "free_directions": free}
