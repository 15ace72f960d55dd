"""See which parts of a parameter a run multiplies its inputs with: fused experts are found by what their module does.

Imports torch alone: evaluators use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_IMPLEMENTATION = "_experts_implementation"


@dataclass(frozen=True)
class Place:
    """Where a weight lies in a parameter that stacks `count` equal ones along its first dimension."""

    index: int
    count: int
    transposed: bool
    """Whether the weight is stored as (in, out)."""

    def within(self, values: Tensor) -> Tensor:
        """Return this weight (out, in) of a parameter's values, (count, rows, cols) or (count * rows, cols)."""
        stack = values if values.dim() == 3 else values.view(self.count, -1, values.shape[-1])
        return stack[self.index].t() if self.transposed else stack[self.index]


class Product(NamedTuple):
    """One product of inputs with a part of a parameter."""

    parameter: str
    place: Place
    inputs: Tensor
    """(tokens, in), without tokens that are all zero where the module gives every token to every part."""
    output: Tensor
    """(tokens, out), without the bias."""


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own parameters that may stack matrices: one of three dimensions, or several of two."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() in (2, 3)}
    return own if any(p.dim() == 3 for p in own.values()) or len(own) > 1 else {}


def stacks_under(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """Return the parameters of a module and of those in it that may stack matrices, by name."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, child in module.named_modules(prefix=prefix)
        for key, parameter in stacks(child).items()
    }


class PartsWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, calls `see` for every matrix product with a part of one of the parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], see: Callable[[Product], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in parameters.items():
            self._by_storage.setdefault(_storage(parameter), []).append((name, parameter))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        output = function(*arguments, **(keywords or {}))
        if function in _PRODUCTS:
            first, second = arguments[-2:] if len(arguments) > 1 else (None, None)
            for product in self._products(first, second, output):
                self._see(product)
        return output

    def _products(self, first: Any, second: Any, output: Tensor) -> Iterator[Product]:
        """Yield the products in `first @ second` of which one operand is part of a parameter."""
        for inputs, weight, result in ((first, second.mT, output), (second.mT, first, output.mT)):
            for name, parameter in self._by_storage.get(_storage(weight), ()):
                if weight.dim() == 2:
                    place = find_place(parameter, weight)
                    if place is not None:
                        yield Product(name, place, inputs, result)
                elif len(weight) > 1:
                    for part, x, y in zip(weight, inputs, result, strict=True):
                        place = find_place(parameter, part)
                        if place is not None:
                            rows = x.any(dim=1)
                            yield Product(name, place, x[rows], y[rows])


_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)


def find_place(parameter: Tensor, weight: Tensor) -> Place | None:
    """Return which part of the parameter a weight (out, in) is a view of; None if not of one of several parts."""
    offset = weight.storage_offset() - parameter.storage_offset()
    size, cols = weight.numel(), parameter.shape[-1]
    if not 0 <= offset < parameter.numel() or parameter.numel() < 2 * size or offset % size or parameter.numel() % size:
        return None
    for transposed in (False, True):
        stored = weight.t() if transposed else weight
        if stored.shape[1] == cols and stored.stride() == (cols, 1):
            return Place(offset // size, parameter.numel() // size, transposed)
    return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def plain_experts(module: nn.Module) -> Iterator[None]:
    """Let modules with fused experts compute expert by expert, with plain matrix products."""
    configurations = {id(c): c for m in module.modules() if hasattr(c := getattr(m, "config", None), _IMPLEMENTATION)}
    before = [(c, getattr(c, _IMPLEMENTATION)) for c in configurations.values()]
    try:
        for configuration, _ in before:
            setattr(configuration, _IMPLEMENTATION, "eager")
        yield
    finally:
        for configuration, implementation in before:
            setattr(configuration, _IMPLEMENTATION, implementation)
