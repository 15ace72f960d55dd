"""Move a scaling of the channels between two layers from the one into the other.

A group of linears computes W x. Multiplying column j of W by s_j and dividing channel j of x by
s_j, where x is made, leaves the product as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from interventions.structure import Linear, LinearGroup, is_linear
from interventions.types import InterventionError


def fold_(group: LinearGroup, scales: Tensor) -> None:
    """Multiply the group's columns by `scales` (in features,) and divide its input by them, in place.

    Raises InterventionError if the group has no previous operation that can take this up, or one of an unknown kind.
    """
    if group.previous is None:
        raise InterventionError(f"{group.linears[0].name}: nothing before it can take up a scaling of its input")
    move_scales_(group.previous, group.linears, scales)


@torch.no_grad()
def move_scales_(operation: nn.Module | Linear, linears: Sequence[Linear], scales: Tensor) -> None:
    """Divide the output of an operation by `scales` and multiply the columns of the linears that read it, in place."""
    divide_output_(operation, scales)
    for linear in linears:
        linear.weight.mul_(scales)


@torch.no_grad()
def divide_output_(module: nn.Module | Linear, scales: Tensor) -> None:
    """Divide the output channels of a norm, or the last ones of a linear layer, by `scales`, in place."""
    if isinstance(module, Linear) or is_linear(module):
        linear = module if isinstance(module, Linear) else Linear("", module)
        rows = slice(-len(scales), None)
        linear.weight[rows].div_(scales.unsqueeze(1))
        if linear.bias is not None:
            linear.bias[rows].div_(scales)
        return
    bias = getattr(module, "bias", None)
    weight = cast(Tensor, module.weight)
    offset = gain_offset(module)
    weight.copy_((weight + offset) / scales - offset)
    if isinstance(bias, Tensor):
        bias.div_(scales)


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float:
    """Return c such that the norm's gain is c + weight: 1 for Gemma's norms, else 0.

    Found by running a copy of the norm with other weights, so that no list of classes is needed. Raises
    InterventionError where the norm is of neither kind.
    """
    norm = copy.deepcopy(norm).float()
    weight = cast(Tensor, norm.weight)
    if isinstance(bias := getattr(norm, "bias", None), Tensor):
        bias.zero_()
    # Mean 0, so that a layer norm's centring has no effect.
    probe = torch.linspace(-3.0, 3.0, len(weight), device=weight.device)
    unit = probe / probe.square().mean().sqrt()

    def follows(gain: float, weight_of_gain: float) -> bool:
        weight.fill_(weight_of_gain)
        return torch.allclose(norm(probe.view(1, 1, -1)).view(-1), gain * unit, rtol=0, atol=0.01)

    for offset in (0.0, 1.0):
        if all(follows(gain, gain - offset) for gain in (0.0, 1.0)):
            return offset
    raise InterventionError(f"{type(norm).__name__}: its output is neither weight nor 1 + weight times a norm")
