"""Which grids the layers of a folder are stored with: packed formats want few of them. Imports no torch."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from interventions.rounding import Rounding

BITS: dict[str, tuple[int, ...]] = {
    "compressed-tensors": (2, 3, 4, 5, 6, 7, 8),
    "gptq": (2, 3, 4, 8),
    "awq": (4,),
}
"""Bits that each packed format stores."""
WHOLE_ROW = -1
LEAST_GROUP = 16
"""Smaller groups are not stored; as in `evaluators.grids`, which imports torch."""


class Scheme(NamedTuple):
    """The grid of a stored layer."""

    bits: int
    group_size: int
    """Columns per scale, or -1 for whole rows."""
    symmetric: bool


class Codes(NamedTuple):
    """A layer as a format stores it."""

    levels: Tensor
    """(rows, cols) int16, 0 .. 2**bits - 1."""
    zeros: Tensor
    """(rows, groups) int16, the level of zero."""
    scales: Tensor
    """(rows, groups), in the stored dtype."""
    scheme: Scheme


@dataclass(frozen=True)
class Found:
    """The grid of a layer (rows, cols) as recovered, which other grids may hold as well."""

    rows: int
    cols: int
    bits: int
    group_size: int
    """As in `Scheme`; divides `cols`."""
    low: int
    high: int
    """Lowest and highest number of steps from zero."""

    def symmetric(self, bits: int) -> bool:
        """Tell whether zero can be in the middle of 2**bits levels."""
        return -(1 << bits - 1) <= self.low and self.high < 1 << bits - 1


class Format(ABC):
    """A packed format."""

    name: ClassVar[str]
    mixed: ClassVar[bool]
    """Whether a folder can hold layers with different grids."""
    by_width: ClassVar[bool] = False
    """Whether layers need a common grid only if they have the same width. Engines fuse such layers."""
    floats: ClassVar[bool] = False
    """Whether layers of floating-point numbers can be stored."""
    experts: ClassVar[bool] = False
    """Whether a layer of each expert can be stored of experts that share a parameter in the model."""
    group_sizes: ClassVar[tuple[int, ...] | None] = None
    """Group sizes beside whole rows; None for any."""

    @abstractmethod
    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return the dtype of stored scales."""

    @abstractmethod
    def problem(self, rows: int, cols: int, bits: int) -> str | None:
        """Say why a layer of this shape cannot be stored, or None."""

    @abstractmethod
    def config(self, layers: Mapping[str, Scheme], left: Iterable[str], rounding: Rounding) -> dict[str, Any]:
        """Return `quantization_config` for packed modules and linear modules `left` in full precision, by name."""

    @abstractmethod
    def store(self, codes: Codes) -> dict[str, Tensor]:
        """Return the stored tensors by the last part of their names."""


def skipped(modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `dynamic` of GPTQModel's configurations for modules in full precision."""
    return {f"-:^{re.escape(name)}$": {} for name in modules}


def fitting_size(group_size: int, cols: int, format: Format) -> int | None:
    """Return the largest group size of a format that divides a row evenly into parts of groups; None if all are small.

    A row whose last group is shorter is cut into smaller groups, several of which have the same scale.
    """
    if group_size >= cols:
        return WHOLE_ROW
    common = math.gcd(group_size, cols)
    sizes = [size for size in format.group_sizes or (common,) if common % size == 0 and size >= LEAST_GROUP]
    return max(sizes, default=None)


def choose_schemes(found: Mapping[str, Found], format: Format) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Return the scheme of each layer that can be stored, and why each other one cannot."""
    classes: dict[int, dict[str, Found]] = defaultdict(dict)
    for name, layer in found.items():
        classes[layer.cols if format.by_width else 0][name] = layer
    schemes: dict[str, Scheme] = {}
    left: dict[str, str] = {}
    for members in classes.values():
        placed: dict[tuple[int, int], list[str]] = defaultdict(list)
        main = _main_grid(members.values(), format)
        for name, layer in members.items():
            if main is not None and _holds(*main, layer, format):
                placed[main].append(name)
            elif layer.bits not in BITS[format.name]:
                left[name] = f"{layer.bits} bits, which {_takers(layer.bits)}"
            elif format.mixed:
                placed[layer.bits, layer.group_size].append(name)
            else:
                left[name] = f"groups of {layer.group_size}, while {format.name} stores one size for all layers"
        for (bits, size), names in placed.items():
            symmetric = all(found[name].symmetric(bits) for name in names)
            schemes |= {name: Scheme(bits, size, symmetric) for name in names}
    return schemes, left


def _main_grid(layers: Iterable[Found], format: Format) -> tuple[int, int] | None:
    """Return the bits and group size that hold the most weights; None if the format stores no layer's bits."""
    layers = list(layers)
    grids = set()
    for layer in layers:
        if layer.bits in BITS[format.name]:
            grids.add((layer.bits, layer.group_size))
            if layer.group_size == WHOLE_ROW and not format.mixed:
                grids |= {(layer.bits, size) for size in format.group_sizes or () if layer.cols % size == 0}

    def worth(grid: tuple[int, int]) -> tuple[float, ...]:
        held = sum(layer.rows * layer.cols for layer in layers if _holds(*grid, layer, format))
        return held, -grid[0], math.inf if grid[1] == WHOLE_ROW else grid[1]

    return max(grids, key=worth, default=None)


def _holds(bits: int, size: int, layer: Found, format: Format) -> bool:
    """Tell whether a layer can be stored with a grid: exactly as large, or finer where there is no choice."""
    same_bits = layer.bits == bits if format.mixed else layer.bits <= bits
    own = layer.cols if layer.group_size == WHOLE_ROW else layer.group_size
    return same_bits and (size == layer.group_size or (size != WHOLE_ROW and own % size == 0))


def _takers(bits: int) -> str:
    takers = [name for name, stored in BITS.items() if bits in stored]
    return f"{' and '.join(takers)} {'stores' if len(takers) == 1 else 'store'}" if takers else "no format stores"
