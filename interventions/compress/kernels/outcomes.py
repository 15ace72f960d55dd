"""Write new weights into linear layers, report the change, and check n:m patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interventions.compress.bases import Pruner
from interventions.compress.kernels.masks import Pattern, check_divides
from interventions.context import Context
from interventions.structure import Block, Linear


def chosen_pattern(settings: Pruner, method: str, blocks: Sequence[Block]) -> Pattern | None:
    """Return the n:m pattern of the settings, or None.

    Raises InterventionError if it does not divide the width of a linear.
    """
    if settings.n_of_m is None:
        return None
    pattern = Pattern(*settings.n_of_m)
    for linear in (linear for block in blocks for linear in block.linears):
        check_divides(pattern, linear.in_features, f"{linear.name} ({method})")
    return pattern


def replace_(linear: Linear, weight: Tensor) -> float:
    """Write new weights (out, in) into a linear; return the norm of the change relative to the old weights."""
    before = linear.weight.float()
    moved = float((weight - before).norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny))
    linear.set_weight_(weight)
    return moved


def prune_(linear: Linear, mask: Tensor) -> dict[str, Any]:
    """Set the weights where `mask` (out, in) is true to zero; return the outcome."""
    before = linear.weight.clone()
    linear.set_weight_(before.masked_fill(mask, 0))
    return outcome(linear, before, linear.weight)


def outcome(linear: Linear, before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return the sparsity of a pruned weight and the number of new zeros."""
    was, zero = before == 0, after == 0
    return {
        "linear": linear.name,
        "sparsity": float(zero.float().mean()),
        "pruned": int((zero & ~was).sum()),
    }


def conclude(outcomes: Sequence[dict[str, Any]], settings: Pruner, context: Context) -> dict[str, Any]:
    """Return a pruning method's details; note in the context if nothing was left to prune."""
    if settings.sparsity > 0 and not any(linear["pruned"] for linear in outcomes):
        context.already(f"every linear layer had at least {settings.sparsity:.0%} zeros before")
    return {"linears": list(outcomes)}
