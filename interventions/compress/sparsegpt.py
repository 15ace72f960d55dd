"""SparseGPT: one-shot pruning with compensation (Frantar & Alistarh, ICML 2023, arXiv 2301.00774).

The weights that are kept make up for those that are pruned, as well as the inputs seen on the
calibration text allow. Linears that share an input share its Gram matrix and its inverse, and are
pruned in one go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from interventions.anatomy import LinearGroup, find_anatomy
from interventions.compress.blockwise import walk_blocks
from interventions.compress.engines.run import run_engine
from interventions.compress.engines.table import OWN
from interventions.compress.pruning import chosen_pattern, conclude, outcome
from interventions.compress.settings import SparseGptSettings
from interventions.compress.sparsegpt_kernel import sparsegpt_prune
from interventions.statistics import InputStatistics
from interventions.step import Context
from interventions.types import InterventionError, Resources
from interventions.zeros import zero_masks


@torch.no_grad()
def sparsegpt(
    model: nn.Module, tokenizer: Any, settings: SparseGptSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Prune the linear layers of every decoder block, in place; `resources.calibration` gives the inputs.

    Returns for each linear its sparsity, the weights newly pruned, and the mean squared error that
    is left in its output on the text, as far as the other layers' changes do not add to it.
    """
    pattern = chosen_pattern(settings, "sparsegpt", find_anatomy(model).blocks)
    if settings.engine != OWN:
        return run_engine("sparsegpt", model, tokenizer, settings, resources, context)

    def work(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        weights = [linear.weight.clone() for linear in group.linears]
        pruned = sparsegpt_prune(
            torch.cat(weights),
            statistics.gram,
            sparsity=settings.sparsity,
            pattern=pattern,
            block_size=settings.block_size,
            damping=settings.damping,
            parts=[len(weight) for weight in weights],
            kept=zero_masks(weights) if settings.preserve_mask else None,
        )
        if pruned is None:
            raise InterventionError(
                f"sparsegpt: the Gram matrix of the input of {group.linears[0].name} cannot be inverted even with a "
                "damping of 1: give more or other calibration text"
            )
        if pruned.damping > settings.damping:
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

    outcomes = walk_blocks(
        model,
        tokenizer,
        resources,
        context,
        method="sparsegpt",
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        sequential=settings.sequential,
        true_sequential=settings.true_sequential,
        work=work,
        sums=InputStatistics,
    )
    return conclude(outcomes, settings, context)
