"""Magnitude pruning: the smallest weights become zero (Han et al., NeurIPS 2015), uniformly over layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.compress.blockwise import check_weights
from interventions.compress.masks import Pattern, lowest, lowest_of_pattern
from interventions.compress.pruning import check_sparsity, conclude, outcome
from interventions.compress.settings import MagnitudeSettings
from interventions.step import Context
from interventions.types import InterventionError, Resources


@torch.no_grad()
def magnitude(
    model: nn.Module, tokenizer: Any, settings: MagnitudeSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Prune the linear layers of every decoder block, in place; no text is read."""
    blocks = find_anatomy(model).blocks
    pattern = check_sparsity(settings, "magnitude", blocks)
    if settings.among not in ("layer", "row"):
        raise InterventionError(f"magnitude: among must be layer or row, not {settings.among!r}")
    for block in blocks:
        check_weights(block, "magnitude")
    outcomes = []
    for block in blocks:
        context.progress(f"magnitude: block {block.index + 1} of {len(blocks)}")
        for linear in block.linears:
            before = linear.weight.clone()
            linear.set_weight_(before.masked_fill(magnitude_mask(before, settings, pattern), 0))
            outcomes.append(outcome(linear, before, linear.weight))
    return conclude(outcomes, settings, context)


def magnitude_mask(W: Tensor, settings: MagnitudeSettings, pattern: Pattern | None) -> Tensor:
    """Return the mask of the weights of W (out, in) to prune."""
    scores = W.float().abs()
    if pattern is not None:
        return lowest_of_pattern(scores, pattern)
    rows = scores if settings.among == "row" else scores.reshape(1, -1)
    return lowest(rows, int(rows.shape[1] * settings.sparsity)).view(W.shape)
