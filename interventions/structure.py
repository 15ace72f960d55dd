"""What a language model is made of, as methods see it: blocks, and in each the linear layers grouped by shared input.

`interventions.anatomy` finds these parts in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interventions.layouts import Role
from interventions.parts import Place
from interventions.types import InterventionError

PLACEMENT = "lmcompose_placement"
"""The attribute of a model that says where it is computed."""


class Part(NamedTuple):
    """One of the equal matrices that a parameter stacks: the weight of one expert."""

    parameter: str
    """Name of the parameter in its module."""
    place: Place
    bias: str | None = None
    """Name of the parameter (count, out) that stacks the biases."""


@dataclass(frozen=True)
class Linear:
    """A linear layer, stored either way round: `y = W x + b` with `weight` W as (out, in)."""

    name: str
    """Dotted path from the model; for a part, that of the parameter and the part's number."""
    module: nn.Module
    part: Part | None = None
    """Which part of the module's parameter it is; None: the module is a linear layer."""

    @property
    def weight(self) -> Tensor:
        """The stored weight, detached, as a view of (out, in)."""
        name = "weight" if self.part is None else self.part.parameter
        return self.within(getattr(self.module, name).detach())

    def within(self, values: Tensor) -> Tensor:
        """Return this layer's part, (out, in), of a tensor of its parameter's shape, as a view."""
        if self.part is not None:
            return self.part.place.within(values)
        return values.t() if isinstance(self.module, Conv1D) else values

    @property
    def bias(self) -> Tensor | None:
        """The stored bias (out,), detached, or None."""
        bias = getattr(self.module, "bias" if self.part is None else self.part.bias or "", None)
        if not isinstance(bias, Tensor):
            return None
        return bias.detach() if self.part is None else bias.detach()[self.part.place.index]

    @property
    def parameter_name(self) -> str:
        """Name of the parameter that holds the weight, maybe with those of other experts."""
        return f"{self.name}.weight" if self.part is None else self.name.rpartition(".")[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def set_weight_(self, weight: Tensor) -> None:
        """Write `weight` (out, in) in place, cast once to the stored dtype."""
        if weight.shape != self.weight.shape:
            raise InterventionError(
                f"{self.name}: a weight of shape {tuple(weight.shape)} cannot replace one of "
                f"{tuple(self.weight.shape)} (out, in)"
            )
        self.weight.copy_(weight.detach())


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input."""

    role: Role
    linears: tuple[Linear, ...]
    declared: nn.Module | Linear | None
    """The operation that seems to make the group's input, where it has the right shape."""
    scope: nn.Module | None
    """The module of the block (attention, MLP) that the group stands in; None: compare the linear itself."""
    can_scale: Callable[[LinearGroup], bool]
    """Proves that the declared operation can absorb a scaling of the group's input."""
    expert: str | None = None
    """Path inside the block of the expert that the group stands in; None: in no expert."""
    routed: bool = False
    """Whether a router chooses the tokens that reach the group."""
    number: int = 0
    """Its number among the groups of the block with the same role and expert."""

    @property
    def key(self) -> str:
        """The role, with expert and number if there are any: unique in a block."""
        number = f"#{self.number}" if self.number else None
        return " ".join(part for part in (self.role, self.expert, number) if part)

    @property
    def previous(self) -> nn.Module | Linear | None:
        """The operation whose output channels can absorb a scaling of the group's input.

        A norm, or a linear layer, of which the last `in_features` rows feed the group. None where none can: asked
        for the first time, a copy of the block is run to see.
        """
        return self.declared if self.declared is not None and self.can_scale(self) else None

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features


@dataclass(frozen=True)
class Memory:
    """The weights that an MLP's output is linear in: those of one layer, or of all routed experts.

    A router gives expert e the weight g_e(x), 0 for most: the output sum_e g_e W_e h_e is [W_1 ... W_E] times the key
    [g_1 h_1; ...; g_E h_E], so all experts together are one layer with one long key.
    """

    name: str
    module: nn.Module
    """The module that puts out the product."""
    linears: tuple[Linear, ...]
    """The output layers, of equal shapes."""
    routed: bool = False

    @property
    def parameter_names(self) -> list[str]:
        return list(dict.fromkeys(linear.parameter_name for linear in self.linears))

    @property
    def parameter_name(self) -> str:
        """What errors call the weights: their parameter, or the module whose experts have one each."""
        names = self.parameter_names
        return names[0] if len(names) == 1 else self.name

    @property
    def in_features(self) -> int:
        """Length of a key, or of the part of one expert."""
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        return self.linears[0].out_features


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    index: int
    name: str
    """Dotted path from the model."""
    module: nn.Module
    linear_groups: tuple[LinearGroup, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    """The linear layers that no method changes, by name, with the reason."""
    routed: tuple[Memory, ...] = ()
    """The output layers of its routed experts."""

    def group(self, role: Role) -> LinearGroup:
        """Return the group of linears with this role, the one with most weights.

        Raises InterventionError if the block has none.
        """
        found = [group for group in self.linear_groups if group.role == role]
        if not found:
            known = ", ".join(dict.fromkeys(group.role for group in self.linear_groups)) or "none"
            raise InterventionError(f"{self.name} has no linear layer with the role {role}; roles there: {known}")
        return max(found, key=lambda group: sum(linear.weight.numel() for linear in group.linears))

    def groups_for(self, role: Role) -> tuple[LinearGroup, ...]:
        """Return the groups with this role; in a block without, those of the mixer that stands in its place."""
        found = tuple(group for group in self.linear_groups if group.role == role)
        other = f"mixer_{role.rpartition('_')[2]}"
        return found or tuple(group for group in self.linear_groups if group.role == other)

    @property
    def stages(self) -> list[tuple[LinearGroup, ...]]:
        """The groups, those of routed experts with the same role together: none of them feeds another."""
        found: list[tuple[LinearGroup, ...]] = []
        for group in self.linear_groups:
            if group.routed and found and found[-1][0].routed and found[-1][0].role == group.role:
                found[-1] += (group,)
            else:
                found.append((group,))
        return found

    @property
    def mlp_output(self) -> Linear:
        """The output layer of the MLP, or of the shared expert: one that every token reaches.

        That of the mixer in a block without MLP. Raises InterventionError where there is none.
        """
        found = [group.linears[0] for group in self.groups_for("mlp_out") if not group.routed]
        if not found:
            return self.group("mlp_out").linears[0]
        # What mixes several hidden states into one may end here as well, with an output for each.
        return max(found, key=lambda linear: (-linear.out_features, linear.weight.numel()))

    @property
    def memory(self) -> Memory:
        """What the MLP's output is linear in: `mlp_output`, or the output layers of routed experts where there is none.

        Raises InterventionError if there is neither.
        """
        if self.routed and all(group.routed for group in self.groups_for("mlp_out")):
            return max(self.routed, key=lambda memory: sum(linear.weight.numel() for linear in memory.linears))
        output = self.mlp_output
        return Memory(output.name, output.module, (output,))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the block, in the order of the data's way."""
        return tuple(linear for group in self.linear_groups for linear in group.linears)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only language model."""

    blocks: tuple[Block, ...]
    embeddings: nn.Module
    final_norm: nn.Module
    """`nn.Identity` where the model has none."""
    head: nn.Module
    width: int
    """Features of the hidden state that the blocks pass on."""
    states: int = 1
    """Hidden states that the blocks pass on for each token."""

    def check_one_stream(self, method: str) -> None:
        """Raise InterventionError if there is more than one hidden state for a token."""
        if self.states > 1:
            raise InterventionError(
                f"{method}: the blocks of this model pass on {self.states} hidden states for each token, so there is "
                "no one stream that has the direction; leave this step out for this model"
            )


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether a module is a linear layer, stored either way round."""
    return isinstance(module, nn.Linear | Conv1D)


def module_device(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter, CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def within_context(model: nn.Module, max_tokens: int) -> int:
    """Return `max_tokens`, or the model's own limit if that is lower: there may be no positions beyond it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    return max_tokens if limit is None else min(max_tokens, limit)


def check_layers(setting: str, layers: Sequence[int], depth: int) -> list[int]:
    """Return `layers` sorted; InterventionError, naming the setting, for one that the model lacks, or for none."""
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise InterventionError(f"{setting}={list(layers)}: the model's blocks are 0 to {depth - 1}")
    return chosen


def chosen_layers(method: str, layers: Sequence[int] | None, fractions: Sequence[float], depth: int) -> list[int]:
    """Return the blocks to edit: as named, or the span from the first to the last of the fractions of depth.

    Raises InterventionError, naming the setting, for a block that the model does not have.
    """
    if layers is not None:
        return check_layers(f"{method}.layers", layers, depth)
    low, high = fractions
    return list(range(round(low * depth), min(round(high * depth), depth - 1) + 1))


def first_output(output: Any) -> Tensor:
    """Return a module's output, or the first of several: some architectures' blocks return a tuple."""
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]


@dataclass
class Switch:
    """Whether an offloaded model is computed on its device just now."""

    on: bool = True


@dataclass(frozen=True)
class Placement:
    """Where a model is computed, and in how much memory."""

    device: torch.device
    budget: int | None = None
    """Bytes on the device that a block being worked on may take, with all that goes with it; None: no bound."""
    switch: Switch | None = None
    """There if the weights are on the host."""

    @property
    def streamed(self) -> bool:
        return self.switch is not None


def placement(model: nn.Module) -> Placement:
    """Return where the model is computed: as set by `offload` or `limit_memory`, else where its weights are."""
    found = getattr(model, PLACEMENT, None)
    return found if isinstance(found, Placement) else Placement(module_device(model))


def limit_memory(model: nn.Module, budget: int) -> None:
    """Set the bytes that a block being worked on may take, for a model whose weights stay where they are."""
    check_budget(budget)
    setattr(model, PLACEMENT, Placement(module_device(model), budget))


@contextmanager
def streaming(model: nn.Module, on: bool) -> Iterator[None]:
    """Let an offloaded model be computed on its device, or not: then it is a model on the CPU throughout."""
    switch = placement(model).switch or Switch()
    before, switch.on = switch.on, on
    try:
        yield
    finally:
        switch.on = before


def check_budget(budget: int | None) -> None:
    if budget is not None and budget < 1:
        raise InterventionError(f"a memory budget must be more than nothing, not {budget} bytes")
