"""Measure how much of a direction the residual stream has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.steer.kernels.prompts import seeing_outputs
from interventions.structure import Anatomy, Block, module_device
from interventions.unlearn.kernels.texts import Rows


def components(model: nn.Module, anatomy: Anatomy, rows: Rows, direction: Tensor) -> list[float]:
    """Return by block the greatest component of its outputs along a unit direction, over the norm of the output.

    Over all tokens of `rows`, each read by itself.
    """
    found = [0.0] * len(anatomy.blocks)

    def see(block: Block, output: Tensor) -> None:
        states = output.double()
        share = (states @ direction.to(states)).abs() / states.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        found[block.index] = max(found[block.index], float(share.max()))
        if block.index == len(anatomy.blocks) - 1:
            raise StopForward

    with seeing_outputs(anatomy.blocks, see):
        for row in rows:
            ids = torch.tensor([row], device=module_device(model))
            run_until_seen(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found
