"""Rounding to nearest: every weight to the nearest level of its grid, the honest baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from interventions.anatomy import find_anatomy
from interventions.compress.blockwise import check_weights
from interventions.compress.grid import check_grid, fake_quantise
from interventions.compress.settings import RtnSettings
from interventions.step import Context
from interventions.types import Resources


@torch.no_grad()
def rtn(
    model: nn.Module, tokenizer: Any, settings: RtnSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

    Zero is a level of every grid, so that pruned weights stay at zero. Returns for each linear how
    far its weights moved, as a share of their norm.
    """
    check_grid(settings.bits, settings.group_size, "rtn")
    blocks = find_anatomy(model).blocks
    for block in blocks:
        check_weights(block, "rtn")
    linears = []
    for block in blocks:
        context.progress(f"rtn: block {block.index + 1} of {len(blocks)}")
        for linear in block.linears:
            weight = linear.weight.float()
            rounded = fake_quantise(weight, settings.bits, settings.group_size, settings.symmetric)
            moved = float((rounded - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))
            linear.set_weight_(rounded)
            linears.append({"linear": linear.name, "moved": moved})
    context.already("every linear layer lay on its grid before")  # the one reason why nothing would change
    return {"linears": linears}
