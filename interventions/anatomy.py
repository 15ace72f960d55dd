"""Find a language model's decoder blocks and, in each, the linear layers grouped by shared input.

Methods ask here instead of naming modules. What a block looks like is declared in
`interventions.layouts`; the list of blocks is found by looking for that structure.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interventions.layouts import ENTRY_POINT_GROUP, LAYOUTS, GroupLayout, Layout, Role
from interventions.types import InterventionError


@dataclass(frozen=True)
class Linear:
    """A linear layer, stored either way round: `y = W x + b` with `weight` W as (out, in)."""

    name: str
    """Dotted path from the model."""
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The stored weight, detached, as a view of (out, in)."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """The stored bias (out,), detached, or None."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.weight"

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
                f"{self.parameter_name}: a weight of shape {tuple(weight.shape)} cannot replace one of "
                f"{tuple(self.weight.shape)} (out, in)"
            )
        self.weight.copy_(weight.detach())


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input."""

    role: Role
    linears: tuple[Linear, ...]
    declared: nn.Module | None
    """The operation that the layout names as the one that makes the group's input, where it has the right shape."""
    scope: nn.Module | None
    """The module of the block (attention, MLP) that the group stands in; None: compare the linear itself."""
    can_scale: Callable[[LinearGroup], bool]
    """Proves that the declared operation can absorb a scaling of the group's input."""

    @property
    def previous(self) -> nn.Module | None:
        """The operation whose output channels can absorb a scaling of the group's input.

        A norm, or a linear layer, of which the last `in_features` rows feed the group. None where none can: asked
        for the first time, a copy of the block is run to see.
        """
        return self.declared if self.declared is not None and self.can_scale(self) else None

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    index: int
    name: str
    """Dotted path from the model."""
    module: nn.Module
    linear_groups: tuple[LinearGroup, ...]

    def group(self, role: Role) -> LinearGroup:
        """Return the group of linears with this role."""
        return next(group for group in self.linear_groups if group.role == role)

    @property
    def attention_output(self) -> Linear:
        return self.group("attention_out").linears[0]

    @property
    def mlp_output(self) -> Linear:
        return self.group("mlp_out").linears[0]

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


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model` by structure.

    Raises InterventionError, naming the part that was not found and how to describe an
    architecture, if no layout fits.
    """
    layouts = _layouts_for(model)
    for layout in layouts:
        lists = [found for found in _lists_of_blocks(model) if not _missing(found[1][0], layout)]
        if len(lists) > 1:
            names = ", ".join(name for name, _ in lists)
            raise InterventionError(f"several lists of decoder blocks look like {layout.name}: {names}. {_HOW}")
        if lists:
            return _build(model, layout, *lists[0])
    raise InterventionError(_not_found(model, layouts))


_HOW = (
    "Describe the architecture with an interventions.layouts.Layout, set as the model's attribute "
    f"`lmcompose_layout` or named by an entry point of the group {ENTRY_POINT_GROUP!r}."
)


def _layouts_for(model: nn.Module) -> tuple[Layout, ...]:
    own = getattr(model, "lmcompose_layout", None)
    if own is not None:
        return (own,)
    added = [entry.load() for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)]
    return (*added, *LAYOUTS)


def _lists_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield name, module


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether a module is a linear layer, stored either way round."""
    return isinstance(module, nn.Linear | Conv1D)


def _missing(block: nn.Module, layout: Layout) -> list[str]:
    """Name the parts of the layout that the block lacks."""
    missing = []
    for group in layout.groups:
        missing += [path for path in group.linears if not is_linear(_submodule(block, path))]
        for path in (group.previous, group.scope):
            if path is not None and _submodule(block, path) is None:
                missing.append(path)
    return missing


def _build(model: nn.Module, layout: Layout, list_name: str, modules: nn.ModuleList) -> Anatomy:
    from interventions.compress.fold_proof import FoldProof  # it asks for the anatomy itself

    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {key for key, count in uses.items() if count > 1}
    proof = FoldProof(model)
    blocks = []
    for index, module in enumerate(modules):
        name = f"{list_name}.{index}"
        missing = _missing(module, layout)
        if missing:
            raise InterventionError(
                f"{name}: looks like {layout.name} but lacks {', '.join(missing)}, unlike block 0. {_HOW}"
            )
        groups = tuple(_group(module, name, group, shared, proof) for group in layout.groups)
        block = Block(index, name, module, groups)
        _check_coverage(block, layout)
        blocks.append(block)
    parent = model.get_submodule(list_name.rpartition(".")[0])
    if "past_key_values" not in inspect.signature(parent.forward).parameters:
        raise InterventionError(
            f"{type(model).__name__}: looks like {layout.name} but {type(parent).__name__} takes no past_key_values: "
            "models without a cache of keys and values are not supported"
        )
    final_norm = _submodule(parent, layout.final_norm) or _norm_after(parent, modules)
    parts = {
        "input embeddings": _call(model, "get_input_embeddings"),
        "output head": _call(model, "get_output_embeddings"),
    }
    for part, found in parts.items():
        if found is None:
            raise InterventionError(f"{type(model).__name__}: no {part} found; is it a causal language model?")
    return Anatomy(
        tuple(blocks),
        parts["input embeddings"],  # type: ignore[arg-type]
        final_norm if final_norm is not None else nn.Identity(),
        parts["output head"],  # type: ignore[arg-type]
    )


def _norm_after(parent: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """Return the first sibling after the list of blocks that has nothing but vectors: a norm by whatever name."""
    siblings = list(parent.children())
    for module in siblings[siblings.index(blocks) + 1 :]:
        parameters = list(module.parameters())
        if parameters and all(p.dim() == 1 for p in parameters):
            return module
    return None


def _call(model: nn.Module, method: str) -> nn.Module | None:
    function = getattr(model, method, None)
    return function() if callable(function) else None


def _group(
    block: nn.Module, name: str, layout: GroupLayout, shared: set[int], proof: Callable[[LinearGroup], bool]
) -> LinearGroup:
    linears = tuple(Linear(f"{name}.{path}", block.get_submodule(path)) for path in layout.linears)
    widths = {linear.name: linear.in_features for linear in linears}
    if len(set(widths.values())) > 1:
        raise InterventionError(f"linear layers said to share one input have different widths: {widths}")
    declared = None if layout.previous is None else block.get_submodule(layout.previous)
    if declared is not None and not _fits(declared, linears, layout, shared):
        declared = None
    scope = None if layout.scope is None else block.get_submodule(layout.scope)
    return LinearGroup(layout.role, linears, declared, scope, proof)


def _fits(declared: nn.Module, linears: tuple[Linear, ...], layout: GroupLayout, shared: set[int]) -> bool:
    """Tell whether scaling `declared` reaches all channels of these linears, and no other part of the model."""
    if not isinstance(getattr(declared, "weight", None), Tensor):
        return False  # a norm without gain
    modules = (declared, *(linear.module for linear in linears))
    if any(id(p) in shared for module in modules for p in module.parameters(recurse=False)):
        return False  # the same tensor works elsewhere too
    if not is_linear(declared):
        return True
    # Under grouped-query attention a value channel feeds several input channels of the output layer.
    return Linear("", declared).out_features == layout.previous_parts * linears[0].in_features


def _check_coverage(block: Block, layout: Layout) -> None:
    named = {id(linear.module) for linear in block.linears}
    others = [name for name, module in block.module.named_modules() if is_linear(module) and id(module) not in named]
    if others:
        raise InterventionError(
            f"{block.name}: looks like {layout.name} but has more linear layers: {', '.join(others)}. {_HOW}"
        )


def _not_found(model: nn.Module, layouts: tuple[Layout, ...]) -> str:
    """Say which part is missing from the layout and the list of modules that come nearest."""
    config = getattr(model, "config", None)
    who = f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r})"
    candidates = [
        (len(missing) / len(layout.groups), layout.name, name, missing)
        for name, modules in _lists_of_blocks(model)
        for layout in layouts
        for missing in [_missing(modules[0], layout)]
    ]
    if not candidates:
        return f"{who}: no list of decoder blocks found (no nn.ModuleList). {_HOW}"
    _, layout_name, name, missing = min(candidates, key=lambda candidate: candidate[0])
    return f"{who}: the blocks at {name} come nearest to {layout_name} but lack {', '.join(missing)}. {_HOW}"


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


def first_output(output: Any) -> Tensor:
    """Return a module's output, or the first of several: some architectures' blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
