"""Interventions for tests of the plugin: quick, and with every way to fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from interventions.registry import Method
from interventions.types import InterventionError


@dataclass(frozen=True)
class NudgeSettings:
    scale: float = 0.01
    layers: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class RoundSettings:
    digits: int = 2


@dataclass(frozen=True)
class InflateSettings:
    scale: float = 1e4


@dataclass(frozen=True)
class NoSettings:
    pass


def nudge(model: Any, tokenizer: Any, settings: NudgeSettings, resources: Any, context: Any) -> dict[str, Any]:
    """Add noise to MLP output projections."""
    import torch

    context.progress("nudging")
    noise = context.generator("noise")
    for layer in settings.layers:
        weight = model.model.layers[layer].mlp.down_proj.weight
        with torch.no_grad():
            weight += settings.scale * torch.randn(weight.shape, generator=noise).to(weight)
    return {"edits": len(resources.edits)}


def round_weights(model: Any, tokenizer: Any, settings: RoundSettings, resources: Any, context: Any) -> dict[str, Any]:
    """Round every linear layer of the blocks."""
    import torch

    context.warn("rounded to nearest")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(parameter.round(decimals=settings.digits))
    return {"loss": float("nan")}


def inflate(model: Any, tokenizer: Any, settings: InflateSettings, resources: Any, context: Any) -> dict[str, Any]:
    """Multiply the head: logits grow, so that likelihoods fall; from 1e30 on they overflow."""
    import torch

    with torch.no_grad():
        model.lm_head.weight *= settings.scale
        if settings.scale > 1e20:
            model.model.norm.weight *= settings.scale
    return {"largest": float("inf")}


def idle(model: Any, tokenizer: Any, settings: Any, resources: Any, context: Any) -> dict[str, Any]:
    """Change nothing."""
    return {}


def refuse(model: Any, tokenizer: Any, settings: Any, resources: Any, context: Any) -> dict[str, Any]:
    """Fail with a readable error."""
    raise InterventionError("layer 7 is missing; lower refuse.layers")


def interrupt(model: Any, tokenizer: Any, settings: Any, resources: Any, context: Any) -> dict[str, Any]:
    """Stand for a user who presses Ctrl-C now."""
    raise KeyboardInterrupt


METHODS = (
    Method("nudge", "edit", f"{__name__}:NudgeSettings", f"{__name__}:nudge"),
    Method("round", "compress", f"{__name__}:RoundSettings", f"{__name__}:round_weights"),
    Method("inflate", "edit", f"{__name__}:InflateSettings", f"{__name__}:inflate"),
    Method("idle", "edit", f"{__name__}:NoSettings", f"{__name__}:idle"),
    Method("refuse", "unlearn", f"{__name__}:NoSettings", f"{__name__}:refuse"),
    Method("interrupt", "unlearn", f"{__name__}:NoSettings", f"{__name__}:interrupt"),
)
