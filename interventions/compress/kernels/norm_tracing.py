"""Find out which norms the linear layers of a block read, by running it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call
from interventions.structure import Block, Linear, first_output

READERS = ("attention_in", "mlp_in")
WRITERS = ("attention_out", "mlp_out")


@dataclass
class Reading:
    """What the linear layers of a block read."""

    readers: dict[nn.Module | None, list[Linear]] = field(default_factory=dict)
    """By norm the linear layers that read its output; None: those that read the stream, or what no norm makes."""
    problem: str | None = None
    """Why the stream cannot be rotated, as far as the structure tells."""


def trace_norms(block: Block, call: Call) -> Reading:
    """Run a block and find out which norms its linear layers read."""
    readers = {g.linears[0].module: g.linears for g in block.linear_groups if g.role in READERS}
    writers = {linear.module: linear for g in block.linear_groups if g.role in WRITERS for linear in g.linears}
    linears = {linear.module for linear in block.linears}
    made: dict[int, nn.Module] = {}
    """Whose output a storage is; the innermost module's where several return it."""
    read: list[tuple[nn.Module, int]] = []
    kept: list[Tensor] = []  # so that no storage is used twice

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        result = first_output(output)
        kept.extend(tensor for tensor in (*inputs[:1], result) if isinstance(tensor, Tensor))
        if inputs and isinstance(inputs[0], Tensor):
            read.append((module, _place(inputs[0])))
        if isinstance(result, Tensor):
            made.setdefault(_place(result), module)

    handles = [module.register_forward_hook(seen) for module in block.module.modules() if module is not block.module]
    try:
        call(block.module)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: f"{block.name}.{name}" for name, module in block.module.named_modules()}
    width = call.hidden.shape[-1]
    found = Reading()
    for module, place in read:
        source = made.get(place)
        if module in readers:
            norm = source if source is not None and is_norm(source, width) else None
            found.readers.setdefault(norm, []).extend(readers[module])
        elif source is not None and source in writers and is_norm(module, width):
            found.problem = f"{names[module]} normalises what {writers[source].name} adds to the stream"
    for module, place in read:
        source = made.get(place)
        weighs = next(module.parameters(recurse=False), None) is not None
        if weighs and source is not None and source in found.readers and module not in linears:
            found.problem = f"{names[module]} reads what {names[source]} puts out, and this step leaves it as it is"
    return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_norm(module: nn.Module, width: int) -> bool:
    """Tell whether a module normalises vectors of `width`: it has no matrices, and twice the input gives the same."""
    if next(module.children(), None) is not None or any(p.dim() != 1 for p in module.parameters()):
        return False
    found = _outputs(module, width, lambda x: (x, 2 * x))
    return found is not None and bool(found[0].any()) and torch.allclose(*found, rtol=1e-3, atol=1e-3)


def subtracts_mean(norm: nn.Module, width: int) -> bool:
    """Tell whether a norm subtracts the mean of its input, so that it commutes only with rotations that keep it."""
    found = _outputs(norm, width, lambda x: (x, x + 1))
    return found is not None and torch.allclose(*found, rtol=1e-3, atol=1e-3)


def _outputs(
    module: nn.Module, width: int, inputs: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Return a float32 copy's outputs for two inputs; None if it does not take one vector and return one."""
    module = copy.deepcopy(module).float()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    probe = torch.linspace(-3.0, 5.0, width, device=device).view(1, 1, -1)
    try:
        one, two = (module(x) for x in inputs(probe))
    except Exception:  # other arguments, or other widths
        return None
    return (one, two) if isinstance(one, Tensor) and one.shape == probe.shape else None
