"""Numbers that are rounded while a model runs: inputs of linear layers, and keys and values of attention.

How they are rounded belongs to the state of a model, as its weights do: set by `set_rounding_`, read by `rounding_of`.
The model's class, modules and weights keep their names. Gradients pass as if nothing were rounded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from interventions.compress.kernels.floating import Floats, two_level_whole
from interventions.compress.kernels.formats import grid_of
from interventions.compress.kernels.grid import join_groups, positive, split_groups, stored_scales
from interventions.compress.kernels.integers import Integers
from interventions.compress.schemes import Scheme
from interventions.floats import E4M3
from interventions.rounded_bits import HELD, note_bits_

_ENTRY = "rounding while the model runs"


@dataclass(frozen=True)
class Rounded:
    """How one tensor is rounded."""

    scheme: Scheme
    scale: float | None = None
    """The scale from calibration text; of two levels, what scales are numbers over. None: found as the model runs."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (..., channels) rounded; its gradient is that of the identity."""
        return cast(Tensor, _StraightThrough.apply(x, self._round))  # type: ignore[no-untyped-call]

    def _round(self, x: Tensor) -> Tensor:
        grid = grid_of(self.scheme, x.dtype)
        rows = x.reshape(-1, x.shape[-1]).float()
        groups = split_groups(rows, grid.group_size)
        if self.scale is None:
            scales, least, greatest = grid.scaling(groups, refit=True)
        else:
            scales = torch.tensor(self.scale, device=x.device)
            if self.scheme.scales == "two-level":
                scales = cast(Floats, grid).two_levels(groups.abs().amax(dim=2, keepdim=True), scales)
            least, greatest = cast(Floats | Integers, grid).limits
        return join_groups(grid.round_(groups / scales, least, greatest).mul_(scales), x.shape[-1]).view_as(x).to(x)


def calibrated(scheme: Scheme, greatest: float, dtype: torch.dtype) -> Rounded:
    """Return the rounding of tensors of a dtype whose greatest magnitude on calibration text is known."""
    largest = torch.tensor(greatest)
    if scheme.scales == "two-level":
        return Rounded(scheme, float(two_level_whole(largest, dtype)))
    most = E4M3.greatest if scheme.floats else 2 ** (scheme.bits - 1) - 0.5
    return Rounded(scheme, float(stored_scales(positive(largest / most), dtype)))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Cached:
    """How the keys and values of one attention are rounded."""

    keys: Rounded
    values: Rounded


@dataclass(frozen=True)
class Rounding:
    """What a model rounds while it runs."""

    inputs: Mapping[str, Rounded] = field(default_factory=dict)
    """By the name of the linear layer."""
    caches: Mapping[str, Cached] = field(default_factory=dict)
    """By the name of the attention module."""

    def __bool__(self) -> bool:
        return bool(self.inputs or self.caches)

    def plain(self) -> dict[str, Any]:
        """Return plain data, which `read_rounding` reads; equal roundings give equal data."""
        return {
            "inputs": {name: asdict(rounded) for name, rounded in sorted(self.inputs.items())},
            "caches": {name: asdict(cached) for name, cached in sorted(self.caches.items())},
        }

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of this rounding as an entry beside those of weights; none if nothing is rounded."""
        plain = json.dumps(self.plain(), sort_keys=True)
        return {_ENTRY: hashlib.sha256(plain.encode()).hexdigest()} if self else {}


def read_rounding(data: Mapping[str, Any] | None) -> Rounding:
    """Read what `Rounding.plain` returned; None: nothing is rounded."""

    def rounded(fields: Mapping[str, Any]) -> Rounded:
        return Rounded(Scheme(**fields["scheme"]), fields["scale"])

    data = data or {"inputs": {}, "caches": {}}
    return Rounding(
        {name: rounded(fields) for name, fields in data["inputs"].items()},
        {name: Cached(rounded(both["keys"]), rounded(both["values"])) for name, both in data["caches"].items()},
    )


@dataclass(frozen=True)
class _InputHook:
    """A forward pre-hook that rounds the first argument of a linear layer."""

    rounded: Rounded

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.rounded(arguments[0]), *arguments[1:])


def rounding_of(model: nn.Module) -> Rounding:
    """Return what the model rounds while it runs."""
    inputs: dict[str, Rounded] = {}
    caches: dict[str, Cached] = {}
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _InputHook):
                inputs[name] = hook.rounded
        if HELD in module.__dict__:
            caches[name] = module.__dict__[HELD]
    return Rounding(inputs, caches)


def set_rounding_(model: nn.Module, rounding: Rounding) -> None:
    """Make the model round so, and nothing else; raises AttributeError for a module that it lacks."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _InputHook)]:
            del module._forward_pre_hooks[key]
        module.__dict__.pop(HELD, None)
        note_bits_(module)
    for name, rounded in rounding.inputs.items():
        # Before other hooks: they see what the layer computes with.
        module = model.get_submodule(name)
        module.register_forward_pre_hook(_InputHook(rounded), prepend=True)
        note_bits_(module, inputs=rounded.scheme.bits)
    for name, cached in rounding.caches.items():
        module = model.get_submodule(name)
        module.__dict__[HELD] = cached
        note_bits_(module, cache=(cached.keys.scheme.bits + cached.values.scheme.bits) / 2)
    if rounding.caches:
        from interventions.rounded_attention import let_attention_round

        let_attention_round(model)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Let the model run as its weights say."""
    rounding = rounding_of(model)
    if not rounding:
        yield
        return
    set_rounding_(model, Rounding())
    try:
        yield
    finally:
        set_rounding_(model, rounding)
