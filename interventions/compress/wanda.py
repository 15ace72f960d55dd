"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695).

A weight counts as much as its magnitude times the norm of its input over the calibration text,
|W_ij| * ||x_j||_2; of each output's weights those that count least become zero, the others stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import LinearGroup, find_anatomy
from interventions.compress.blockwise import walk_blocks
from interventions.compress.engines.run import run_engine
from interventions.compress.engines.table import OWN
from interventions.compress.masks import Pattern, lowest, lowest_of_pattern
from interventions.compress.pruning import chosen_pattern, conclude, prune_
from interventions.compress.settings import WandaSettings
from interventions.statistics import InputNorms
from interventions.step import Context
from interventions.types import Resources


@torch.no_grad()
def wanda(
    model: nn.Module, tokenizer: Any, settings: WandaSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Prune the linear layers of every decoder block, in place; `resources.calibration` gives the inputs."""
    pattern = chosen_pattern(settings, "wanda", find_anatomy(model).blocks)
    if settings.engine != OWN:
        return run_engine("wanda", model, tokenizer, settings, resources, context)

    def work(group: LinearGroup, statistics: InputNorms) -> list[dict[str, Any]]:
        norms = statistics.square_sum.sqrt()
        return [
            prune_(linear, wanda_mask(linear.weight, norms, settings.sparsity, pattern)) for linear in group.linears
        ]

    outcomes = walk_blocks(
        model,
        tokenizer,
        resources,
        context,
        method="wanda",
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        sequential=settings.sequential,
        true_sequential=False,
        work=work,
        sums=InputNorms,
    )
    return conclude(outcomes, settings, context)


def wanda_mask(W: Tensor, norms: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Return the mask of the weights of W (out, in) to prune: the same number in every row, rounded down.

    `norms` (in,) are those of the input's channels; only their ratios matter.
    """
    scores = (W.float() * norms).abs_()
    if pattern is not None:
        return lowest_of_pattern(scores, pattern)
    return lowest(scores, int(W.shape[1] * sparsity))
