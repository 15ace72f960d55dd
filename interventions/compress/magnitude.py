"""Magnitude pruning: the smallest weights become zero (Han et al., NeurIPS 2015), uniformly over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.compress.bases import Pruner, Sparsity
from interventions.intervention import Context, Model, Resources, without_gradients
from interventions.ranges import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.compress.kernels.masks import Pattern


@dataclass(frozen=True)
class MagnitudeSettings(Pruner):
    """Magnitude pruning, uniform over layers."""

    name = "magnitude"

    sparsity: Sparsity = 0.5
    """Share of each linear's weights that become zero; the number is rounded down."""
    among: Annotated[str, Choice("layer", "row")] = "layer"
    """What a weight is compared with: those of its `layer`, as a rule, or of its `row` (its output) alone."""

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Prune the linear layers of every decoder block, in place; no text is read."""
        from interventions.anatomy import find_anatomy
        from interventions.compress.kernels.blockwise import each_linear
        from interventions.compress.kernels.outcomes import chosen_pattern, conclude, prune_

        pattern = chosen_pattern(self, "magnitude", find_anatomy(model).blocks)
        outcomes = [
            prune_(linear, magnitude_mask(linear.weight, self, pattern))
            for linear in each_linear(model, context, "magnitude")
        ]
        return conclude(outcomes, self, context)


def magnitude_mask(W: Tensor, settings: MagnitudeSettings, pattern: Pattern | None) -> Tensor:
    """Return the mask of the weights of W (out, in) to prune."""
    from interventions.compress.kernels.masks import lowest, lowest_of_pattern

    scores = W.float().abs()
    if pattern is not None:
        return lowest_of_pattern(scores, pattern)
    rows = scores if settings.among == "row" else scores.reshape(1, -1)
    return lowest(rows, int(rows.shape[1] * settings.sparsity)).view(W.shape)
