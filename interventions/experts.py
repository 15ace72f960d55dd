"""Find the routed experts of a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from interventions.structure import Linear, LinearGroup
from interventions.types import InterventionError


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one block."""

    path: str
    """Path inside the block of the module that holds the experts."""
    router: Linear | None
    """The layer that chooses the experts; no method changes it."""
    groups: tuple[LinearGroup, ...]


def find_experts(block_name: str, block: nn.Module) -> list[ExpertLayer]:
    """Return the layers of routed experts in a block; InterventionError for any, as no method can change them yet."""
    for path, module in block.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        equal = isinstance(module, nn.ModuleList) and len(module) > 1 and "expert" in path
        if equal or (own and not isinstance(module, nn.modules.conv._ConvNd)):
            raise InterventionError(f"{block_name}.{path}: routed experts are not supported")
    return []
