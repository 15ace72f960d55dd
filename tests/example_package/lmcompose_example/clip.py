"""Clipping: what an intervention looks like."""

from __future__ import annotations

from typing import Any

import torch

from interventions import Resources
from interventions.anatomy import find_anatomy
from interventions.context import Context
from lmcompose_example.settings import ClipSettings


@torch.no_grad()
def clip(
    model: torch.nn.Module, tokenizer: Any, settings: ClipSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Cut the outlying weights of every decoder block, in place.

    The anatomy finds the linear layers of any supported architecture. What is returned stands in the report.
    """
    cut = total = 0
    for block in find_anatomy(model).blocks:
        for linear in block.linears:
            weight = linear.weight
            limit = settings.deviations * weight.std()
            cut += int((weight.abs() > limit).sum())
            total += weight.numel()
            linear.set_weight_(weight.clamp(-limit, limit))
    context.progress(f"cut {cut} of {total} weights")
    return {"cut": cut, "total": total}
