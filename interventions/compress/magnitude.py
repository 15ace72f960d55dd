"""Magnitude pruning: the smallest weights become zero (Han et al., NeurIPS 2015), uniformly over layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.compress.blockwise import each_linear
from interventions.compress.masks import Pattern, lowest, lowest_of_pattern
from interventions.compress.pruning import chosen_pattern, conclude, prune_
from interventions.compress.settings import MagnitudeSettings
from interventions.step import Context
from interventions.types import Resources


@torch.no_grad()
def magnitude(
    model: nn.Module, tokenizer: Any, settings: MagnitudeSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Prune the linear layers of every decoder block, in place; no text is read."""
    pattern = chosen_pattern(settings, "magnitude", find_anatomy(model).blocks)
    outcomes = [
        prune_(linear, magnitude_mask(linear.weight, settings, pattern))
        for linear in each_linear(model, context, "magnitude")
    ]
    return conclude(outcomes, settings, context)


def magnitude_mask(W: Tensor, settings: MagnitudeSettings, pattern: Pattern | None) -> Tensor:
    """Return the mask of the weights of W (out, in) to prune."""
    scores = W.float().abs()
    if pattern is not None:
        return lowest_of_pattern(scores, pattern)
    rows = scores if settings.among == "row" else scores.reshape(1, -1)
    return lowest(rows, int(rows.shape[1] * settings.sparsity)).view(W.shape)
