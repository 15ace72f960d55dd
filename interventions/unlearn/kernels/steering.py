"""The losses of RMU, on the hidden states of one block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.structure import Block, first_output
from interventions.unlearn.kernels.texts import TextBatch


def control_vector(width: int, coefficient: float, generator: torch.Generator) -> Tensor:
    """Return a vector (width,) float32 of norm `coefficient`, its direction uniform in [0, 1) by component."""
    direction = torch.rand(width, generator=generator)
    control: Tensor = coefficient * direction / direction.norm()
    return control


def states(model: nn.Module, block: Block, batch: TextBatch) -> Tensor:
    """Return the output of `block` at the tokens of the batch, (tokens, hidden), without padding.

    The forward pass ends there.
    """
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(first_output(output))
        raise StopForward

    handle = block.module.register_forward_hook(see)
    try:
        run_until_seen(model, {"input_ids": batch.ids})  # no token sees the padding on the right
    finally:
        handle.remove()
    values = seen[0]
    if values.shape[:2] != batch.mask.shape:  # several hidden states for each token, one after another
        values = values.movedim(0, 2)
    return values[batch.mask.bool()]


def forget_loss(seen: Tensor, control: Tensor) -> Tensor:
    """Return the mean squared distance of states (tokens, hidden) from the control vector (hidden,)."""
    return (seen.float() - control.to(seen.device)).square().mean()


def retain_loss(seen: Tensor, frozen: Tensor) -> Tensor:
    """Return the mean squared distance of states (tokens, hidden) from their original values."""
    return (seen.float() - frozen.to(seen.device).float()).square().mean()
