"""Change how many experts a model has: the tensors that have one entry each, and what modules and config say."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interventions.experts import ExpertLayer
from interventions.types import InterventionError

_COUNT = re.compile(r"(moe_)?n(um)?_((?!shared|zero|active)\w+_)?experts")
"""Names of attributes with the number of routed experts, such as num_local_experts."""


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters, each under its first name, and the buffers that checkpoints contain."""
    entries = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in entries}
    return {**dict(model.named_parameters()), **buffers}


def one_per_expert(block: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
    """Return the tensors of the experts and their router that have one entry per expert in front, by name in the block.

    They belong to the experts, to the router, or to a module between one of them and the one around both.
    """
    assert layer.router is not None
    modules = dict(block.named_modules())
    router = next(name for name, module in modules.items() if module is layer.router.module)
    paths = [layer.path.split("."), router.split(".")]
    around = next(size for size, (one, other) in enumerate(zip(*paths, strict=False)) if one != other)
    owners = {name for name in modules if f"{name}.".startswith(f"{layer.path}.")}
    for parts in paths:
        owners |= {".".join(parts[:size]) for size in range(around, len(parts) + 1)}
    return {
        f"{name}.{key}".lstrip("."): tensor
        for name in owners
        for key, tensor in (*modules[name]._parameters.items(), *modules[name]._buffers.items())
        if tensor is not None and tensor.dim() and len(tensor) == layer.count
    }


@torch.no_grad()
def resize_(model: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    """Give the model's tensors as many entries as those of `wanted` have, and set the numbers of experts."""
    counts = set()
    for name, tensor in stored_tensors(model).items():
        shape = wanted[name].shape if name in wanted else tensor.shape
        if tensor.dim() and tensor.shape[1:] == shape[1:] and len(tensor) != shape[0]:
            counts.add((len(tensor), shape[0]))
            tensor.data = tensor.new_empty(shape)
    for before, now in counts:
        set_count_(model, before, now)


def set_count_(model: nn.Module, before: int, now: int) -> None:
    """Replace the number of routed experts in the modules' attributes and in the configurations."""
    for holder in _holders(model):
        for name, value in list(vars(holder).items()):
            if type(value) is int and value == before and _COUNT.fullmatch(name):
                setattr(holder, name, now)
        if isinstance(holder, nn.Linear):
            holder.out_features = len(holder.weight)


def _holders(model: nn.Module) -> Iterator[Any]:
    """Yield the modules and all their configurations, each once."""
    seen: set[int] = set()
    waiting: list[Any] = list(model.modules())
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        yield holder
        configurations = [getattr(holder, "config", None)] if isinstance(holder, nn.Module) else vars(holder).values()
        waiting += [value for value in configurations if hasattr(value, "to_dict")]


def check_buildable(model: nn.Module, method: str) -> None:
    """Raise InterventionError if a model made from the configuration would have tensors of other shapes."""
    config = getattr(model, "config", None)
    if config is None:
        return
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(config)).state_dict()
    for name, tensor in model.state_dict().items():
        shape = tuple(fresh[name].shape) if name in fresh else None
        if shape != tuple(tensor.shape):
            raise InterventionError(
                f"{method}: {name} would be {tuple(tensor.shape)}, but a {type(model).__name__} made from the "
                f"configuration has {shape}: experts of this architecture cannot be removed"
            )
