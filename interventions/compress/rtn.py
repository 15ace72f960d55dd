"""Rounding to nearest: every weight to the nearest level of its grid, the honest baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from interventions.compress.blockwise import each_linear
from interventions.compress.grid import fake_quantise
from interventions.compress.rounding import replace_
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
    linears = []
    for linear in each_linear(model, context, "rtn"):
        rounded = fake_quantise(linear.weight, settings.bits, settings.group_size, settings.symmetric)
        linears.append({"linear": linear.name, "moved": replace_(linear, rounded)})
    context.already("every linear layer lay on its grid before")  # the one reason why nothing would change
    return {"linears": linears}
