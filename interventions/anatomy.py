"""Find a language model's decoder blocks and, in each, the linear layers grouped by shared input.

`interventions.layouts` declares the structure of a block; this module searches the model for it, so that
methods need not name modules.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points

from torch import Tensor, nn

from interventions.compress.kernels.fold_proof import FoldProof
from interventions.experts import ExpertLayer, find_experts
from interventions.layouts import ENTRY_POINT_GROUP, LAYOUTS, GroupLayout, Layout
from interventions.structure import Anatomy, Block, Linear, LinearGroup, is_linear
from interventions.types import InterventionError


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


def _missing(block: nn.Module, layout: Layout) -> list[str]:
    """Return the parts of the layout that the block lacks; experts stand for an MLP."""
    missing = []
    routed = bool(find_experts("", block))
    for group in layout.groups:
        if routed and group.role.startswith("mlp"):
            continue
        missing += [path for path in group.linears if not is_linear(_submodule(block, path))]
        for path in (group.previous, group.scope):
            if path is not None and _submodule(block, path) is None:
                missing.append(path)
    return missing


def _build(model: nn.Module, layout: Layout, list_name: str, modules: nn.ModuleList) -> Anatomy:
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {key for key, count in uses.items() if count > 1}
    blocks: list[Block] = []
    proof = FoldProof(model, blocks)
    for index, module in enumerate(modules):
        name = f"{list_name}.{index}"
        missing = _missing(module, layout)
        if missing:
            raise InterventionError(
                f"{name}: looks like {layout.name} but lacks {', '.join(missing)}, unlike block 0. {_HOW}"
            )
        experts = find_experts(name, module)
        chosen = [group for group in layout.groups if not experts or not group.role.startswith("mlp")]
        groups = [_group(module, name, group, shared, proof) for group in chosen]
        groups += [*_beside_experts(name, module, experts, proof), *(g for layer in experts for g in layer.groups)]
        block = Block(index, name, module, tuple(groups))
        if not experts:
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


def _beside_experts(
    name: str, block: nn.Module, experts: list[ExpertLayer], proof: Callable[[LinearGroup], bool]
) -> Iterator[LinearGroup]:
    """Yield the groups of MLPs with the usual three layers that stand beside routed experts."""
    inside = {id(linear.module) for layer in experts for group in layer.groups for linear in group.linears}
    layers = ("gate_proj", "up_proj", "down_proj")
    for path, module in block.named_modules() if experts else ():
        found = [getattr(module, layer, None) for layer in layers]
        if not all(is_linear(layer) and id(layer) not in inside for layer in found):
            continue
        gate, up, down = (Linear(f"{name}.{path}.{layer}", getattr(module, layer)) for layer in layers)
        yield LinearGroup("mlp_in", (gate, up), None, None, proof, path)
        yield LinearGroup("mlp_out", (down,), up.module, None, proof, path)


def _norm_after(parent: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """Return the first sibling after the list of blocks whose parameters are all vectors: the final norm."""
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
    """Return whether scaling `declared` reaches all channels of these linears, and no other part of the model."""
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
    """Return a message that names the closest layout and list of modules, and the missing parts."""
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
