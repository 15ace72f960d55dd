"""Layers of whole numbers, as packed formats store them: levels, zero points and scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evaluators.grids import Grid
from pytest_lmcompose.checkpoints.grids import multiply, recover, spread, steps, zero_points
from pytest_lmcompose.checkpoints.schemes import WHOLE_ROW, Codes, Format, Found, Scheme, fitting_size


class PackedLayer(NamedTuple):
    """How a layer is stored."""

    scheme: Scheme
    scales: Tensor
    """(rows, groups) float32."""


def recover_layer(weight: Tensor, grid: Grid | None, format: Format) -> tuple[Found, Tensor] | str | None:
    """Return a weight's grid and its scales, None if its groups cannot be stored, or what is wrong in words."""
    rows, cols = weight.shape
    found = None if grid is None else recover(weight, grid.bits, grid.group_size)
    if grid is None or found is None:
        return "no grid"
    size = fitting_size(grid.group_size, cols, format)
    if size is None:
        return None
    scales = found.scales
    if size != WHOLE_ROW and size != grid.group_size:
        scales = scales.repeat_interleave(grid.group_size // size, dim=1)[:, : cols // size]
    return Found(rows, cols, grid.bits, size, found.low, found.high), scales


def regroup(scales: Tensor, found: Found, scheme: Scheme) -> Tensor:
    """Repeat scales for the smaller groups of the scheme that a layer is stored with."""
    groups = 1 if scheme.group_size == WHOLE_ROW else found.cols // scheme.group_size
    return scales.repeat_interleave(groups // scales.shape[1], dim=1)


def scale_problem(layer: PackedLayer, format: Format, weight: Tensor) -> str | None:
    """Say that a format cannot store the scales, or return None."""
    stored = layer.scales.to(format.scale_dtype(weight.dtype))
    near = (stored.float() - layer.scales).abs() <= torch.finfo(stored.dtype).eps * layer.scales
    return None if bool(near.all()) else f"scales out of the range of {str(stored.dtype).removeprefix('torch.')}"


def encode(weight: Tensor, layer: PackedLayer, format: Format) -> Codes:
    """Return a weight (rows, cols) as levels."""
    (bits, size, symmetric), scales = layer
    size = weight.shape[1] if size == WHOLE_ROW else size
    numbers = steps(weight, scales, size)
    if symmetric:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int16, device=weight.device)
    else:
        zeros = zero_points(numbers, size, bits)
    levels = (numbers + spread(zeros, size, weight.shape[1])).clamp_(0, 2**bits - 1)
    return Codes(levels, zeros, scales.to(format.scale_dtype(weight.dtype)), layer.scheme)


def decode(codes: Codes) -> Tensor:
    """Return (level - zero) * scale, float32."""
    cols = codes.levels.shape[1]
    size = cols if codes.scheme.group_size == WHOLE_ROW else codes.scheme.group_size
    return multiply(codes.levels - spread(codes.zeros, size, cols), codes.scales.float(), size)
