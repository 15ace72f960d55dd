"""Move a scaling of the channels between two layers from the one into the other.

A group of linears computes W x. Multiplying column j of W by s_j and dividing channel j of x by
s_j, where x is made, leaves the product as it is.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from interventions.anatomy import Linear, LinearGroup, is_linear
from interventions.types import InterventionError


@torch.no_grad()
def fold_(group: LinearGroup, scales: Tensor) -> None:
    """Multiply the group's columns by `scales` (in features,) and divide its input by them, in place.

    Raises InterventionError if the group has no previous operation, or one of an unknown kind.
    """
    previous = group.previous
    if previous is None:
        raise InterventionError(f"{group.linears[0].name}: nothing before it can take up a scaling of its input")
    divide_output_(previous, scales)
    for linear in group.linears:
        linear.weight.mul_(scales)


@torch.no_grad()
def divide_output_(module: nn.Module, scales: Tensor) -> None:
    """Divide the output channels of a norm, or the last ones of a linear layer, by `scales`, in place."""
    bias = getattr(module, "bias", None)
    if is_linear(module):
        rows = slice(-len(scales), None)
        Linear("", module).weight[rows].div_(scales.unsqueeze(1))
        if isinstance(bias, Tensor):
            bias[rows].div_(scales)
        return
    weight = cast(Tensor, module.weight)
    offset = gain_offset(module)
    weight.copy_((weight + offset) / scales - offset)
    if isinstance(bias, Tensor):
        bias.div_(scales)


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float:
    """Return c such that the norm's gain is c + weight: 1 for Gemma's norms, else 0.

    Found by running the norm, so that no list of classes is needed. Raises InterventionError
    where the norm is of neither kind.
    """
    weight = cast(Tensor, norm.weight)
    bias = getattr(norm, "bias", None)
    probe = torch.linspace(-3.0, 3.0, len(weight), device=weight.device, dtype=weight.dtype)
    probe = probe.roll(1)  # mean 0, so that a layer norm's centring does nothing
    unit = probe.float() / probe.float().pow(2).mean().sqrt()
    output = norm(probe.view(1, 1, -1)).float().view(-1)
    if isinstance(bias, Tensor):
        output = output - bias.float()
    for offset in (0.0, 1.0):
        expected = unit * (weight.float() + offset)
        if (output - expected).norm() <= 0.02 * expected.norm() + 1e-6:
            return offset
    raise InterventionError(f"{type(norm).__name__}: its output is neither weight nor 1 + weight times a norm")
