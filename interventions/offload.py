"""Models larger than the memory of one accelerator: weights on the host, computed part by part.

From outside such a model is one on the CPU: its parameters, inputs and outputs are there. Within a
forward pass without gradients each block, and each module beside the blocks that has weights of its
own, is held on the device while it runs. Passes with gradients run on the host as a whole. Methods
that go through a model block by block ask `placement` for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.structure import PLACEMENT, Placement, Switch, check_budget, placement
from interventions.types import InterventionError


def offload(model: nn.Module, device: torch.device, budget: int | None = None) -> None:
    """Let a model on the CPU be computed on `device`, part by part, from now on.

    Raises InterventionError for a model with weights elsewhere, and for one that is offloaded already.
    """
    check_budget(budget)
    elsewhere = [name for name, p in model.named_parameters() if p.device.type != "cpu"]
    if elsewhere:
        raise InterventionError(f"only a model on the CPU can be computed part by part: {elsewhere[0]} is elsewhere")
    if placement(model).streamed:
        raise InterventionError("the model is computed part by part already")
    switch = Switch()
    for module in _parts(model):
        _wrap(module, partial(_part_forward, module, module.forward, device, switch))
    _wrap(model, partial(_model_forward, model.forward, device, switch))
    setattr(model, PLACEMENT, Placement(device, budget, switch))


def _wrap(module: nn.Module, forward: partial[Any]) -> None:
    # A copy of the module gets a copy of the partial, bound to itself; its signature is still asked for.
    module.__dict__["forward"] = update_wrapper(forward, module.forward)


def _parts(model: nn.Module) -> list[nn.Module]:
    blocks = [block.module for block in find_anatomy(model).blocks]
    inside = {module for block in blocks for module in block.modules()}
    beside = [
        module
        for module in model.modules()
        if module not in inside and (_own(module.parameters(recurse=False)) or _own(module.buffers(recurse=False)))
    ]
    return [*blocks, *(module for module in beside if module is not model)]


def _own(tensors: Iterator[Tensor]) -> bool:
    return next(tensors, None) is not None


def _part_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    device: torch.device,
    switch: Switch,
    *arguments: Any,
    **keywords: Any,
) -> Any:
    if torch.is_grad_enabled() or not switch.on:
        return forward(*arguments, **keywords)
    from_host = next((t.device.type == "cpu" for t in _tensors((*arguments, *keywords.values()))), False)
    with held(module, device):
        output = forward(*moved(arguments, device), **moved(keywords, device))
    return moved(output, torch.device("cpu")) if from_host else output


def _model_forward(
    forward: Callable[..., Any], device: torch.device, switch: Switch, *arguments: Any, **keywords: Any
) -> Any:
    if torch.is_grad_enabled() or not switch.on:
        return forward(*arguments, **keywords)
    return moved(forward(*moved(arguments, device), **moved(keywords, device)), torch.device("cpu"))


@contextmanager
def held(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's weights and buffers on the device; what is on the host stays, and is not written."""
    host = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers()) if tensor.device != device]
    try:
        for tensor, data in host:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in host:
            tensor.data = data


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with every tensor in it on the device: in tuples, lists, dicts and model outputs."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):  # outputs of models as well, whose class is kept
        changed = {key: moved(item, device) for key, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    return value  # a KV cache among others, which belongs to the device


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
