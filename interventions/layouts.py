"""What roles linear layers have, and how to declare where a block keeps them (no torch).

`interventions.anatomy` finds the layers of a model by running it. Where that fails, a `Layout` declares them: it names
things inside one decoder block, so it fits wherever the blocks stand in the model. Other packages add theirs through
the entry-point group `lmcompose.layouts`, whose entries name a `Layout`; a single model may carry its own as the
attribute `lmcompose_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["attention_in", "attention_out", "mixer_in", "mixer_out", "mlp_in", "mlp_out"]
"""What a linear layer is there for: attention, another way to mix tokens (state space, linear attention, convolution),
or the MLP; before (`in`) or after (`out`) what stands in the middle."""
ROLES: tuple[Role, ...] = get_args(Role)

ENTRY_POINT_GROUP = "lmcompose.layouts"


@dataclass(frozen=True)
class GroupLayout:
    """Linear layers of a block that read one input, as paths inside the block."""

    role: Role
    linears: tuple[str, ...]
    previous: str | None = None
    """The operation that makes the group's input. Whether dividing its output channels by a factor does nothing
    else than dividing the group's input is tried on each block."""
    previous_parts: int = 1
    """For a fused `previous`: equal parts stacked in its rows, of which the last feeds the group."""
    scope: str | None = None
    """The module whose output tells how much an error in the group matters; None: the linear itself."""


@dataclass(frozen=True)
class Layout:
    """One family of decoder blocks. `final_norm` is a sibling of the list of blocks."""

    name: str
    final_norm: str
    groups: tuple[GroupLayout, ...]
