"""Linear layers that take adapters of peft. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from interventions.layouts import ROLES, Role
from interventions.ranges import Choice
from interventions.types import InterventionError

if TYPE_CHECKING:
    from interventions.structure import Anatomy, Block, Linear

IN_ATTENTION = ("query", "key", "value")
Target = Annotated[str, Choice(*IN_ATTENTION, *ROLES)]
"""Linear layers of a block: one of the three projections into attention, or a role."""


def chosen_linears(method: str, anatomy: Anatomy, targets: Sequence[str], layers: Sequence[int] | None) -> list[Linear]:
    """Return the linear layers that the settings `targets` and `layers` (None: all blocks) of a method name.

    Raises InterventionError for blocks that the model lacks, and for linear layers that it lacks or that take no
    adapters.
    """
    from interventions.structure import chosen_layers

    depth = len(anatomy.blocks)
    blocks = [anatomy.blocks[i] for i in (range(depth) if layers is None else chosen_layers(method, layers, (), depth))]
    linears: dict[str, Linear] = {}
    for target in targets:
        role: Any = "attention_in" if target in IN_ATTENTION else target
        for found in (group for block in blocks for group in _adaptable(method, block, role, target)):
            if target in IN_ATTENTION and len(found) == len(IN_ATTENTION):
                found = (found[IN_ATTENTION.index(target)],)
            linears |= {linear.name: linear for linear in found}
    if not linears:
        raise InterventionError(f"{method}.targets={list(targets)}: the chosen blocks have no such linear layer")
    return list(linears.values())


def where_adapted(linears: Sequence[Linear]) -> dict[str, Any]:
    """Return the options of a `LoraConfig` that put adapters on these linear layers and no others."""
    from transformers.pytorch_utils import Conv1D

    # A pattern, because peft also matches the names in a list as suffixes.
    pattern = "|".join(name.replace(".", r"\.") for name in sorted({linear.name for linear in linears}))
    return {"target_modules": f"({pattern})", "fan_in_fan_out": isinstance(linears[0].module, Conv1D)}


def _adaptable(method: str, block: Block, role: Role, target: str) -> list[tuple[Linear, ...]]:
    """Return the linear layers with a role by group; InterventionError where all are parts of one of fused experts."""
    groups = [group.linears for group in block.groups_for(role)]
    modules = [linears for linears in groups if all(linear.part is None for linear in linears)]
    if groups and not modules:
        raise InterventionError(
            f"{method}.targets: {target} in {block.name} is in routed experts that share one parameter, "
            f"{groups[0][0].parameter_name}, which takes no adapters: choose q, k, v or attention_out"
        )
    return modules
