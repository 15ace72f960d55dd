"""Choose the parameters that unlearning trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from interventions.experts import find_experts, router_parameters
from interventions.layouts import ROLES
from interventions.names import near_names
from interventions.structure import Anatomy, Block, check_layers
from interventions.types import InterventionError


class Choice(Protocol):
    """The settings that say what is trained."""

    @property
    def layers(self) -> list[int] | None: ...
    @property
    def layer_fraction(self) -> float: ...
    @property
    def parameters(self) -> list[str] | None: ...
    @property
    def train_head(self) -> bool: ...


def last_layers(method: str, settings: Choice, depth: int) -> list[int]:
    """Return the blocks that `settings` trains: those named, or the last ones."""
    if settings.layers is not None:
        return check_layers(f"{method}.layers", settings.layers, depth)
    return list(range(depth - max(1, round(settings.layer_fraction * depth)), depth))


def named_in_blocks(
    method: str, model: nn.Module, blocks: Sequence[Block], names: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Return the parameters of `blocks` that match `names`: roles of linear layers, or names relative to a block."""
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[str, nn.Parameter] = {}
    for block in blocks:
        inside = [name for name, _ in block.module.named_parameters()]
        for name in names:
            if name in ROLES:
                role: Any = name
                found = [linear.parameter_name for group in block.groups_for(role) for linear in group.linears]
            elif name in inside:
                found = [f"{block.name}.{name}"]
            else:
                known = [*ROLES, *inside]
                raise InterventionError(
                    f"{method}.parameters: {block.name} has no {name!r}.{near_names(name, known)} "
                    f"Known: {', '.join(known)}."
                )
            chosen |= {full: every[full] for full in found}
    if not chosen:
        raise InterventionError(f"{method}.parameters={list(names)}: the chosen blocks have no such linear layer")
    return chosen


def trained_parameters(
    method: str, model: nn.Module, anatomy: Anatomy, layers: Sequence[int], settings: Choice
) -> dict[str, nn.Parameter]:
    """Return the parameters that `settings` trains in the blocks `layers`, and the final norm and output head.

    A head whose weight is used elsewhere, as by tied embeddings, is left out, and so are routers that the settings do
    not name.
    """
    blocks = [anatomy.blocks[layer] for layer in layers]
    if settings.parameters is None:
        routers = {
            id(p)
            for block in blocks
            for layer in find_experts(block.name, block.module)
            for p in router_parameters(block.module, layer)
        }
        chosen = [p for block in blocks for p in block.module.parameters() if id(p) not in routers]
    else:
        chosen = list(named_in_blocks(method, model, blocks, settings.parameters).values())
    wanted = {id(p) for p in chosen}
    if settings.train_head:
        embedded = {id(p) for p in anatomy.embeddings.parameters()}
        ends = [*anatomy.final_norm.parameters(), *anatomy.head.parameters()]
        wanted |= {id(p) for p in ends} - embedded
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}
