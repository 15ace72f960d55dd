"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695).

A weight counts as much as its magnitude times the norm of its input over the calibration text,
|W_ij| * ||x_j||_2; of each output's weights those that count least become zero, the others stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.compress.bases import Calibrated, Pruner
from interventions.compress.engines.table import OWN
from interventions.intervention import without_gradients
from interventions.ranges import Share

if TYPE_CHECKING:
    from torch import Tensor, nn

    from interventions.compress.kernels.masks import Pattern
    from interventions.context import Context
    from interventions.statistics import InputNorms
    from interventions.structure import LinearGroup
    from interventions.types import Resources


@dataclass(frozen=True)
class WandaSettings(Calibrated, Pruner):
    """Wanda (Sun et al., 2024); defaults as published."""

    name = "wanda"

    sparsity: Share = 0.5
    """Share of each row's (output's) weights that become zero; the number is rounded down."""
    sequential: bool = True
    """Calibrate each block on what the already pruned blocks put out."""

    @without_gradients
    def run(self, model: nn.Module, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Prune the linear layers of every decoder block, in place; `resources.calibration` gives the inputs."""
        from interventions.anatomy import find_anatomy
        from interventions.compress.engines.run import run_engine
        from interventions.compress.kernels.blockwise import walk_blocks
        from interventions.compress.kernels.pruning import chosen_pattern, conclude, prune_
        from interventions.statistics import InputNorms

        pattern = chosen_pattern(self, "wanda", find_anatomy(model).blocks)
        if self.engine != OWN:
            return run_engine("wanda", model, tokenizer, self, resources, context)

        def work(group: LinearGroup, statistics: InputNorms) -> list[dict[str, Any]]:
            norms = statistics.square_sum.sqrt()
            return [
                prune_(linear, wanda_mask(linear.weight, norms, self.sparsity, pattern)) for linear in group.linears
            ]

        outcomes = walk_blocks(
            model,
            tokenizer,
            resources,
            context,
            method=self.name,
            samples=self.samples,
            max_tokens=self.max_tokens,
            sequential=self.sequential,
            true_sequential=False,
            work=work,
            sums=InputNorms,
        )
        return conclude(outcomes, self, context)


def wanda_mask(W: Tensor, norms: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Return the mask of the weights of W (out, in) to prune: the same number in every row, rounded down.

    `norms` (in,) are those of the input's channels; only their ratios matter.
    """
    from interventions.compress.kernels.masks import lowest, lowest_of_pattern

    scores = (W.float() * norms).abs_()
    if pattern is not None:
        return lowest_of_pattern(scores, pattern)
    return lowest(scores, int(W.shape[1] * sparsity))
