"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695).

A weight counts as much as its magnitude times the norm of its input over the calibration text,
|W_ij| * ||x_j||_2; of each output's weights those that count least become zero, the others stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.compress.bases import Pruner, Sequential, Sparsity
from interventions.compress.engines.table import OWN
from interventions.intervention import Context, Model, Resources, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.compress.kernels.masks import Pattern
    from interventions.statistics import InputNorms
    from interventions.structure import LinearGroup


@dataclass(frozen=True)
class WandaSettings(Sequential, Pruner):
    """Wanda (Sun et al., 2024); defaults as published."""

    name = "wanda"

    sparsity: Sparsity = 0.5
    """Share of each row's (output's) weights that become zero; the number is rounded down."""

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Prune the linear layers of every decoder block, in place; `resources.calibration` gives the inputs."""
        from interventions.anatomy import find_anatomy
        from interventions.compress.engines.run import run_engine
        from interventions.compress.kernels.blockwise import walk_blocks
        from interventions.compress.kernels.outcomes import chosen_pattern, conclude, prune_
        from interventions.statistics import InputNorms

        pattern = chosen_pattern(self, "wanda", find_anatomy(model).blocks)
        if self.engine != OWN:
            return run_engine("wanda", model, tokenizer, self, resources, context)

        def work(group: LinearGroup, statistics: InputNorms) -> list[dict[str, Any]]:
            norms = statistics.square_sum.sqrt()
            return [
                prune_(linear, wanda_mask(linear.weight, norms, self.sparsity, pattern)) for linear in group.linears
            ]

        outcomes = walk_blocks(model, tokenizer, self, resources, context, work, InputNorms)
        return conclude(outcomes, self, context)


def wanda_mask(W: Tensor, norms: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Return the mask of the weights of W (out, in) to prune: the same number in every row, rounded down.

    `norms` (in,) has one norm per input channel; only their ratios matter.
    """
    from interventions.compress.kernels.masks import lowest, lowest_of_pattern

    scores = (W.float() * norms).abs_()
    if pattern is not None:
        return lowest_of_pattern(scores, pattern)
    return lowest(scores, int(W.shape[1] * sparsity))
