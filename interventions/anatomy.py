"""Find a language model's decoder blocks and, in each, the linear layers grouped by shared input.

The parts are found by running the model once on a few tokens, not by names: see `block_search`, `wiring` and `roles`.
Where that fails, a declared `interventions.layouts.Layout` says where they are.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interventions.block_search import BlockList, find_blocks
from interventions.compress.kernels.fold_proof import FoldProof
from interventions.experts import ExpertLayer, find_experts, memories, router_parameters
from interventions.layouts import ENTRY_POINT_GROUP, GroupLayout, Layout, Role
from interventions.modes import keep_modes
from interventions.roles import find_groups
from interventions.rounding import unrounded
from interventions.structure import Anatomy, Block, Linear, LinearGroup, is_linear
from interventions.trace import ModuleCall, Trace, same, trace
from interventions.types import InterventionError
from interventions.wiring import wire

_HOW = (
    "Describe the architecture with an interventions.layouts.Layout, set as the model's attribute "
    f"`lmcompose_layout` or named by an entry point of the group {ENTRY_POINT_GROUP!r}."
)
_found: WeakKeyDictionary[nn.Module, tuple[Any, Anatomy]] = WeakKeyDictionary()
"""By model: what its anatomy depends on, and the anatomy."""

Proof = Callable[[LinearGroup], bool]


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`; again only if its modules, parameters or hooks are others than the last time.

    The model is run on a few tokens and stays as it is. Raises InterventionError, naming the part that was not found
    and how to declare it.
    """
    shape = _shape(model)
    known = _found.get(model)
    if known is None or known[0] != shape:
        with unrounded(model):  # what is rounded no longer is the same tensor
            known = _found[model] = (shape, _find(model))
    return known[1]


def _shape(model: nn.Module) -> Any:
    """Return what the anatomy of a model depends on, by identity."""
    parts: list[Any] = [id(getattr(model, "lmcompose_layout", None))]
    for module in model.modules():
        parts += (id(module), id(module.__dict__.get("forward")))
        parts += ((id(p), None if p is None else p.shape) for p in module._parameters.values())
        parts += (*map(id, module._forward_hooks.values()), *map(id, module._forward_pre_hooks.values()))
    return parts


def _find(model: nn.Module) -> Anatomy:
    layouts = _layouts_for(model)
    embeddings, head = (_part(model, part) for part in ("input embeddings", "output embeddings"))
    seen = trace(model)
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {key for key, count in uses.items() if count > 1}
    blocks: list[Block] = []
    found = find_blocks(model, seen, _HOW)
    layout = next((layout for layout in layouts if not _missing(found.calls[0].module, layout)), None)
    if layout is None and getattr(model, "lmcompose_layout", None) is not None:
        missing = ", ".join(_missing(found.calls[0].module, layouts[0]))
        raise InterventionError(f"{found.names[0]}: its layout {layouts[0].name} names what it lacks: {missing}")
    proof = FoldProof(model, blocks, found.calls)
    weights: set[int] = set()
    inside = _inside(seen, found)
    with keep_modes(model), torch.no_grad(), torch.random.fork_rng(_devices(model)):
        for index, (name, call, inner) in enumerate(zip(found.names, found.calls, inside, strict=True)):
            if layout is not None:
                blocks.append(_declared_block(index, name, call.module, layout, shared, proof))
            else:
                blocks.append(_block(index, name, call, inner, seen.tokens, weights, shared, proof))
    if not any(block.linear_groups for block in blocks):
        reasons = ", ".join(sorted({reason for block in blocks for reason in block.left.values()}))
        raise InterventionError(
            f"{found.name}: the decoder blocks have no linear layer that can be changed ({reasons}). {_HOW}"
        )
    hidden = found.calls[-1].outputs[0]
    norm, width = _final_norm(model, seen, found, layout), hidden.shape[-1]
    groups = [group for block in blocks for group in block.groups_for("mlp_out")]
    outs = [group.linears[0].out_features for group in groups if not group.routed]
    outs = outs or [group.linears[0].out_features for group in groups]
    states = hidden.numel() // (min(outs, default=width) * seen.tokens)
    return Anatomy(tuple(blocks), embeddings, norm, head, width, max(1, states))


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _layouts_for(model: nn.Module) -> list[Layout]:
    own = getattr(model, "lmcompose_layout", None)
    if own is not None:
        return [own]
    return [entry.load() for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)]


def _part(model: nn.Module, part: str) -> nn.Module:
    function = getattr(model, f"get_{part.replace(' ', '_')}", None)
    found: nn.Module | None = function() if callable(function) else None
    if found is None:
        raise InterventionError(f"{type(model).__name__}: no {part} found; is it a causal language model?")
    return found


def _inside(seen: Trace, found: BlockList) -> Iterator[Sequence[ModuleCall]]:
    """Yield the calls inside each block."""
    starts = [seen.calls.index(call) for call in found.calls]
    for start, end in zip(starts, [*starts[1:], len(seen.calls)], strict=True):
        inside = {id(module) for module in seen.calls[start].module.modules()}
        yield [call for call in seen.calls[start + 1 : end] if id(call.module) in inside]


def _block(
    index: int,
    name: str,
    call: ModuleCall,
    inner: Sequence[ModuleCall],
    tokens: int,
    weights: set[int],
    shared: set[int],
    proof: Proof,
) -> Block:
    """Find the groups of a block by running it."""
    experts = find_experts(name, call.module)
    apart = {id(linear.module) for layer in experts for group in layer.groups for linear in group.linears}
    routers = {id(p) for layer in experts for p in router_parameters(call.module, layer)}
    apart |= {id(module) for module in call.module.modules() if is_linear(module) and id(module.weight) in routers}
    wiring = wire(name, call, inner, tokens, weights, apart)
    found, left = find_groups(wiring)
    groups = []
    numbers: collections.Counter[tuple[Role, str | None]] = collections.Counter()
    for group in found:
        declared = group.declared if _fits(group.declared, group.linears, None, shared) else None
        scope = None if group.scope is None else call.module.get_submodule(group.scope)
        expert = _beside(group.linears, name, experts) if group.role.startswith("mlp") else None
        number = numbers[group.role, expert]
        numbers[group.role, expert] += 1
        groups.append(LinearGroup(group.role, group.linears, declared, scope, proof, expert=expert, number=number))
    groups += [group for layer in experts for group in layer.groups]
    return Block(index, name, call.module, tuple(groups), wiring.left | left, memories(name, call.module, experts))


def _beside(linears: Sequence[Linear], name: str, experts: Sequence[ExpertLayer]) -> str | None:
    """Return the path of the module that layers beside routed experts stand in."""
    return linears[0].name.removeprefix(f"{name}.").rpartition(".")[0] if experts else None


def _fits(declared: nn.Module | None, linears: tuple[Linear, ...], parts: int | None, shared: set[int]) -> bool:
    """Return whether scaling `declared` reaches all channels of these linears, and no other part of the model."""
    if declared is None or not isinstance(getattr(declared, "weight", None), Tensor):
        return False  # a norm without gain
    modules = (declared, *(linear.module for linear in linears))
    if any(id(p) in shared for module in modules for p in module.parameters(recurse=False)):
        return False  # the same tensor works elsewhere too
    if not is_linear(declared):
        return declared.weight.shape == (linears[0].in_features,)
    # Under grouped-query attention a value channel feeds several input channels of the output layer.
    width = Linear("", declared).out_features
    return width % linears[0].in_features == 0 if parts is None else width == parts * linears[0].in_features


def _final_norm(model: nn.Module, seen: Trace, found: BlockList, layout: Layout | None) -> nn.Module:
    """Return the module that reads what the last block puts out, if its parameters are all vectors."""
    if layout is not None:
        declared = _submodule(model.get_submodule(found.name.rpartition(".")[0]), layout.final_norm)
        if declared is not None:
            return declared
    last = found.calls[-1]
    inside = {id(module) for module in last.module.modules()}
    for call in seen.calls[seen.calls.index(last) + 1 :]:
        parameters = list(call.module.parameters())
        if id(call.module) in inside or not parameters or any(p.dim() != 1 for p in parameters):
            continue
        if any(same(a, b) for a in last.outputs for b in call.inputs):
            return call.module
    return nn.Identity()


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


def _declared_block(index: int, name: str, module: nn.Module, layout: Layout, shared: set[int], proof: Proof) -> Block:
    missing = _missing(module, layout)
    if missing:
        raise InterventionError(
            f"{name}: looks like {layout.name} but lacks {', '.join(missing)}, unlike block 0. {_HOW}"
        )
    experts = find_experts(name, module)
    chosen = [group for group in layout.groups if not experts or not group.role.startswith("mlp")]
    groups = [_declared_group(module, name, group, shared, proof) for group in chosen]
    groups += [group for layer in experts for group in layer.groups]
    block = Block(index, name, module, tuple(groups), routed=memories(name, module, experts))
    named = {id(linear.module) for linear in block.linears}
    others = [path for path, part in module.named_modules() if is_linear(part) and id(part) not in named]
    if others and not experts:
        raise InterventionError(
            f"{name}: looks like {layout.name} but has more linear layers: {', '.join(others)}. {_HOW}"
        )
    return block


def _declared_group(block: nn.Module, name: str, layout: GroupLayout, shared: set[int], proof: Proof) -> LinearGroup:
    linears = tuple(Linear(f"{name}.{path}", block.get_submodule(path)) for path in layout.linears)
    widths: Mapping[str, int] = {linear.name: linear.in_features for linear in linears}
    if len(set(widths.values())) > 1:
        raise InterventionError(f"linear layers said to share one input have different widths: {widths}")
    declared = None if layout.previous is None else block.get_submodule(layout.previous)
    if not _fits(declared, linears, layout.previous_parts, shared):
        declared = None
    scope = None if layout.scope is None else block.get_submodule(layout.scope)
    return LinearGroup(layout.role, linears, declared, scope, proof)
