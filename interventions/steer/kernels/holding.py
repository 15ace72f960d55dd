"""Biases that can hold a direction of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.steer.kernels.prompts import seeing_outputs
from interventions.steer.kernels.writers import FAMILIES, Writer
from interventions.structure import Block, module_device
from interventions.types import InterventionError

PLACES = {"attention": FAMILIES[0], "mlp": FAMILIES[1]}
_NEAR = 1e-2
"""Greatest share of the change of a block's output that may not be along the direction."""


class Holder(NamedTuple):
    """A bias that is added to the residual stream."""

    name: str
    bias: Tensor


def find_holder(model: nn.Module, block: Block, writers: Sequence[Writer], where: str) -> Holder:
    """Return the output bias of the attention or the MLP of a block, or of the norm after it.

    Raises InterventionError if there is none.
    """
    groups = [group for group in block.linear_groups if group.role in PLACES[where] and not group.routed]
    linears = {linear.name for group in groups for linear in group.linears}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for writer in writers:
        module = writer.end
        bias = getattr(module, "bias", None)
        if writer.name in linears and isinstance(bias, nn.Parameter):
            return Holder(names[id(bias)], bias.detach())
    other = "attention" if where == "mlp" else "mlp"
    raise InterventionError(
        f"steer: the {where} of {block.name} has no output bias that can hold a direction; try steer.where={other}, or "
        "give the model such biases, as docs/methods.md shows for mlp_bias and attention_bias of Llama"
    )


def fitted(model: nn.Module, block: Block, holder: Holder, direction: Tensor, row: Sequence[int]) -> Tensor:
    """Return what to add to the bias at the end of a block so that its output moves by `direction` (width,).

    Some models multiply what a block adds (Granite). Raises InterventionError where the direction does not arrive.
    """
    own, kept = direction.to(holder.bias), holder.bias.clone()
    before = _output(model, block, row)
    holder.bias.add_(own)
    moved = _output(model, block, row) - before
    holder.bias.copy_(kept)
    wanted = direction.to(moved)
    factor = float((moved @ wanted).mean() / (wanted @ wanted))
    rounding = torch.finfo(holder.bias.dtype).eps * float(before.norm(dim=-1).max())
    off = float((moved - factor * wanted).norm(dim=-1).max())
    if not off <= _NEAR * abs(factor) * float(wanted.norm()) + rounding:
        raise InterventionError(
            f"steer: what {holder.name} adds does not arrive in the residual stream as it is: something stands "
            "between; choose other blocks (steer.layers), or leave this step out for this model"
        )
    return own if abs(factor - 1) <= _NEAR else own / factor


def _output(model: nn.Module, block: Block, row: Sequence[int]) -> Tensor:
    """Return the output of a block on a text, (tokens, width) float64."""
    seen: list[Tensor] = []

    def see(block: Block, output: Tensor) -> None:
        seen.append(output[0].double())
        raise StopForward

    ids = torch.tensor([list(row)], device=module_device(model))
    with seeing_outputs([block], see):
        run_until_seen(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return seen[0]
