"""SparseGPT: one-shot pruning with compensation (Frantar & Alistarh, ICML 2023, arXiv 2301.00774).

The weights that are kept make up for those that are pruned, as well as the inputs seen on the
calibration text allow. Linears that share an input share its Gram matrix and its inverse, and are
pruned in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.compress.bases import Damping, Pruner, Sequential, Sparsity
from interventions.compress.engines.table import OWN
from interventions.intervention import ZEROS, Context, Model, Resources, without_gradients
from interventions.ranges import Count, Preserve

if TYPE_CHECKING:
    from interventions.statistics import InputStatistics
    from interventions.structure import LinearGroup


@dataclass(frozen=True)
class SparseGptSettings(Sequential, Pruner):
    """SparseGPT (Frantar & Alistarh, 2023); defaults as published, but for `preserve_mask`."""

    name = "sparsegpt"

    sparsity: Sparsity = 0.5
    """Share of weights that become zero, in each block of columns over all rows."""
    block_size: Count = 128
    """Columns whose masks are chosen at a time; a pattern must fit in, else the next smaller multiple is taken."""
    damping: Damping = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold, with a warning, where it
    leaves the matrix singular."""
    true_sequential: bool = False
    """The same within a block: calibrate each group of linears on the pruned ones before it. More forward passes."""
    preserve_mask: Preserve = True
    """Keep weights at zero that are zero already, and count them, in a linear with at least 5 % of them. As
    published, compensation would fill them again."""

    def keeps(self, metric: str) -> bool:
        """Compensation moves the weights that stay: off their grid, and with `preserve_mask` no zero away from zero."""
        return metric in ZEROS and self.preserve_mask

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Prune the linear layers of every decoder block, in place; `resources.calibration` gives the inputs.

        Returns for each linear its sparsity, the weights newly pruned, and the mean squared error that
        is left in its output on the text, as far as the other layers' changes do not add to it.
        """
        import torch

        from interventions.anatomy import find_anatomy
        from interventions.compress.engines.run import run_engine
        from interventions.compress.kernels.blockwise import walk_blocks
        from interventions.compress.kernels.outcomes import chosen_pattern, conclude, outcome
        from interventions.compress.kernels.sparsegpt_kernel import sparsegpt_prune
        from interventions.statistics import InputStatistics
        from interventions.types import InterventionError
        from interventions.zeros import zero_masks

        pattern = chosen_pattern(self, "sparsegpt", find_anatomy(model).blocks)
        if self.engine != OWN:
            return run_engine("sparsegpt", model, tokenizer, self, resources, context)

        def work(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
            weights = [linear.weight.clone() for linear in group.linears]
            pruned = sparsegpt_prune(
                torch.cat(weights),
                statistics.gram,
                sparsity=self.sparsity,
                pattern=pattern,
                block_size=self.block_size,
                damping=self.damping,
                parts=[len(weight) for weight in weights],
                kept=zero_masks(weights) if self.preserve_mask else None,
            )
            if pruned is None:
                raise InterventionError(
                    f"sparsegpt: the Gram matrix of the input of {group.linears[0].name} cannot be inverted even with "
                    "a damping of 1: give more or other calibration text"
                )
            if pruned.damping > self.damping:
                context.warn(
                    f"sparsegpt: {group.linears[0].name}: damping raised to {pruned.damping:g}; set damping to that, "
                    "or give more calibration text"
                )
            outcomes = []
            low = 0
            for linear, before in zip(group.linears, weights, strict=True):
                high = low + len(before)
                linear.set_weight_(pruned.weight[low:high])
                loss = float(pruned.losses[low:high].mean()) / statistics.count
                outcomes.append(outcome(linear, before, linear.weight) | {"loss": loss})
                low = high
            return outcomes

        outcomes = walk_blocks(model, tokenizer, self, resources, context, work, InputStatistics)
        return conclude(outcomes, self, context)
