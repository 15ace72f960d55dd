"""A dense formulation of AWQ: no Gram matrix, no caught block, no code that the method shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.structure import LinearGroup


def dense_round(W: Tensor, bits: int, group_size: int) -> Tensor:
    """Round to grids whose steps are float16 numbers."""
    columns = []
    for start in range(0, W.shape[1], group_size):
        part = W[:, start : start + group_size]
        low = part.min(dim=1, keepdim=True).values.clamp(max=0)
        high = part.max(dim=1, keepdim=True).values.clamp(min=0)
        step = ((high - low) / (2**bits - 1)).half().float()
        short = torch.round(-low / step) + torch.round(high / step) < 2**bits - 1  # both ends would round inwards
        step = torch.where(short, (step * (1 - 2**-11)).half().float(), step)
        zero = torch.round(-low / step)
        columns.append(((torch.round(part / step) + zero).clamp(0, 2**bits - 1) - zero) * step)
    return torch.cat(columns, dim=1)


def dense_scales(ratio: float, x: Tensor, weights: list[Tensor], group_size: int, duo: bool) -> Tensor:
    s = x.abs().mean(dim=0) ** ratio
    if duo:
        relative = []
        for W in weights:
            parts = [W[:, i : i + group_size].abs() for i in range(0, W.shape[1], group_size)]
            relative.append(torch.cat([p / (p.max(dim=1, keepdim=True).values + 1e-6) for p in parts], dim=1))
        s = s / (torch.cat(relative).mean(dim=0) ** (1 - ratio) + 1e-4)
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def dense_clip(W: Tensor, x: Tensor, bits: int, group_size: int) -> tuple[Tensor, int]:
    """Clip each group of each row at the best of ten thresholds; return also how many were clipped."""
    clipped, shrunk = W.clone(), 0
    for row in range(W.shape[0]):
        for start in range(0, W.shape[1], group_size):
            w, part = W[row, start : start + group_size], x[:, start : start + group_size]
            limits = [w.abs().max() * (1 - i / 20) for i in range(10)]
            candidates = torch.stack([w.clamp(-limit, limit) for limit in limits])
            errors = (part @ (dense_round(candidates, bits, group_size) - w).t()).pow(2).mean(dim=0)
            best = int(errors.argmin())
            shrunk += best > 0
            clipped[row, start : start + group_size] = candidates[best]
    return clipped, shrunk


@torch.no_grad()
def dense_losses(
    model: Any, ids: Tensor, group: LinearGroup, bits: int, group_size: int, duo: bool = True
) -> list[float]:
    """Run the whole float model with this group's weights rounded, for each of 20 ratios."""
    kept: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, args: Any) -> None:
        kept["x"] = args[0].reshape(-1, args[0].shape[-1])

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        kept["y"] = output[0] if isinstance(output, tuple) else output

    watched = group.scope or group.linears[0].module
    handles = [
        group.linears[0].module.register_forward_pre_hook(keep_input),
        watched.register_forward_hook(keep_output),
    ]
    model(ids)
    x, wanted = kept["x"].clone(), kept["y"].clone()
    originals = [linear.weight.clone() for linear in group.linears]
    losses = []
    for step in range(20):
        s = dense_scales(step / 20, x, originals, group_size, duo)
        for linear, W in zip(group.linears, originals, strict=True):
            linear.set_weight_(dense_round(W * s, bits, group_size) / s)
        model(ids)
        losses.append(float((kept["y"] - wanted).pow(2).mean()))
    for linear, W in zip(group.linears, originals, strict=True):
        linear.set_weight_(W)
    for handle in handles:
        handle.remove()
    return losses
