"""Layers of floating-point numbers, as compressed-tensors stores them: FP8, MXFP4, MXFP8 and NVFP4.

As in `pytest_lmcompose.checkpoints.grids`, scales are recovered from the values, so that scale times number, rounded to
the weight's dtype, gives back these very values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluators.float_grids import Layout, blocks_of, find_scales
from interventions.floats import E2M1, E4M3

_NEIGHBOURS = 3  # floating-point numbers on either side of a scale that are tried


class FloatLayer(NamedTuple):
    """How a layer is stored."""

    layout: Layout
    scales: Tensor
    """(n, 1) float32, one a block."""
    whole: float = 1.0
    """What scales are divided by (NVFP4)."""


def float_format(layout: Layout) -> str:
    """Return the name of the format in compressed-tensors."""
    if not layout.powers:
        return "nvfp4-pack-quantized" if layout.two_levels else "float-quantized"
    return {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}[layout.format.bits]


def plan_floats(weight: Tensor, layout: Layout) -> FloatLayer | str:
    """Return how a weight (out, in) that lies on a grid is stored, or why it cannot be."""
    cols = weight.shape[1]
    if layout.cols > 0 and layout.rows == 1 and cols % layout.cols:
        return f"{cols} columns, where groups of {layout.cols} want a multiple"
    if layout.scale_bits == 8 and weight.dtype != torch.bfloat16:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"{dtype} weights, where {float_format(layout)} wants bfloat16: build with model.dtype=bfloat16"
    blocks = blocks_of(weight, layout)
    if layout.two_levels:
        return _over_one(blocks, layout) or "scales that are no FP8 numbers over a common one"
    scales = find_scales(blocks, layout)
    if scales is None:
        return "no grid"
    if layout.powers:
        inside = bool(((scales >= 2.0**-126) & (scales <= 2.0**127)).all())
        return FloatLayer(layout, scales) if inside else "scales out of the range of powers of two"
    exact = _exact(blocks, scales, layout)
    return f"scales that are no {str(weight.dtype).removeprefix('torch.')} numbers" if exact is None else exact


def _exact(blocks: Tensor, scales: Tensor, layout: Layout) -> FloatLayer | None:
    """Return the layer with scales of the weight's dtype that give back all values."""
    numbers = layout.format.round(blocks.float() / scales)
    least, most = _bounds(blocks, numbers)
    middle = torch.where(least <= most, (least + most) / 2, scales.double()).to(blocks.dtype)
    chosen = torch.zeros_like(scales)
    for tried in _around(middle):
        rows = (chosen == 0).squeeze(1).nonzero().flatten()
        if not len(rows):
            break
        part = tried[rows].float()
        same = ((numbers[rows] * part).to(blocks.dtype) == blocks[rows]).all(dim=1)
        chosen[rows[same]] = part[same]
    return FloatLayer(layout, chosen) if bool((chosen > 0).all()) else None


def _bounds(blocks: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest scale (n, 1) that gives back all values of a block, float64."""
    values, numbers = blocks.double().abs(), numbers.double().abs()
    info = torch.finfo(blocks.dtype)
    half = values.clamp(min=info.smallest_normal) * info.eps / 2
    unused = numbers == 0
    least = ((values - half) / numbers).masked_fill_(unused, 0).amax(dim=1, keepdim=True)
    most = ((values + half) / numbers).masked_fill_(unused, float("inf")).amin(dim=1, keepdim=True)
    return least, torch.where(most.isinf(), 1.0, most)


def _around(middle: Tensor) -> list[Tensor]:
    """Return positive numbers and their neighbours of the same dtype, the nearest first."""
    integers = {torch.float32: torch.int32}.get(middle.dtype, torch.int16)
    found = [middle]
    for off in range(1, _NEIGHBOURS + 1):
        found += [(middle.view(integers) + sign * off).view(middle.dtype) for sign in (1, -1)]
    return found


def _over_one(blocks: Tensor, layout: Layout) -> FloatLayer | None:
    """Return the layer with the FP8 scales and the scale of the matrix that give back all values."""
    values = blocks.float()
    largest = values.abs().amax(dim=1, keepdim=True)
    filled = largest > 0
    eps = torch.finfo(blocks.dtype).eps + 4e-7
    possible = []  # the scale of each group by what number its largest value is, 0 where that fits not
    for number in (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5):
        scale = torch.where(filled, largest / number, 1.0)
        numbers = values / scale
        fits = ((numbers - E2M1.round(numbers)).abs() <= numbers.abs() * eps).all(dim=1, keepdim=True)
        possible.append(torch.where(fits & filled, scale, 0.0))
    by_number = torch.cat(possible, dim=1)  # (n, 7)
    top = float(by_number.amax(dim=1).max())
    for greatest in (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0):
        layer = _over(blocks, by_number, greatest / top, layout, eps) if top > 0 else None
        if layer is not None:
            return layer
    return None


def _over(blocks: Tensor, by_number: Tensor, whole: float, layout: Layout, eps: float) -> FloatLayer | None:
    """Return the layer whose scales are FP8 numbers over about `whole`, or None."""
    shares = by_number * whole
    eights = E4M3.round(shares)
    fits = ((eights - shares).abs() <= 2 * eps * shares) & (eights > 0)
    place = fits.float().argmax(dim=1, keepdim=True)
    filled = (blocks != 0).any(dim=1, keepdim=True)
    if not bool((fits.any(dim=1, keepdim=True) | ~filled).all()):
        return None
    scales = torch.where(filled, eights.gather(1, place), 0.125)
    numbers = E2M1.round(blocks.float() / (scales / whole))
    least, most = _bounds((blocks.flatten()).unsqueeze(0), (numbers * scales).reshape(1, -1))
    middle = (1 / ((least + most) / 2)).float()
    for tried in [middle.to(torch.bfloat16).float(), middle.half().float(), *_around(middle)]:
        if bool(((numbers * (scales / tried)).to(blocks.dtype) == blocks).all()):
            return FloatLayer(layout, scales, float(tried))
    return None


def stored_floats(weight: Tensor, layer: FloatLayer) -> dict[str, Tensor]:
    """Return the stored tensors by the last part of their names."""
    state = {"weight": weight, "weight_scale": _shaped(layer, weight)}
    if layer.layout.two_levels:
        state["weight_global_scale"] = torch.tensor([layer.whole], device=weight.device)
    return dict(_compressor(layer.layout).compress(state, _scheme(layer.layout)))


def loaded_floats(weight: Tensor, layer: FloatLayer) -> Tensor:
    """Return the weight that a loader computes from what is stored, in the weight's dtype."""
    stored = _compressor(layer.layout).decompress(stored_floats(weight, layer), _scheme(layer.layout))
    return stored["weight"].to(weight.dtype)  # type: ignore[no-any-return]


def _shaped(layer: FloatLayer, weight: Tensor) -> Tensor:
    """Return the scales in the shape and dtype that compressed-tensors knows."""
    scales = layer.scales.to(torch.float32 if layer.layout.scale_bits == 8 else weight.dtype)
    return scales.reshape(1) if layer.layout.rows < 0 else scales.reshape(-(-len(weight) // layer.layout.rows), -1)


def _compressor(layout: Layout) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(float_format(layout))


def _scheme(layout: Layout) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=float_arguments(layout))


def float_arguments(layout: Layout) -> Any:
    """Return the weight arguments of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs

    sharing: dict[str, Any]
    if layout.rows < 0:
        sharing = {"strategy": "tensor"}
    elif layout.rows > 1:
        sharing = {"strategy": "block", "block_structure": [layout.rows, layout.cols]}
    elif layout.cols < 0:
        sharing = {"strategy": "channel"}
    else:
        dtype = torch.float8_e4m3fn if layout.two_levels else torch.uint8
        strategy = "tensor_group" if layout.two_levels else "group"
        sharing = {"strategy": strategy, "group_size": layout.cols, "scale_dtype": dtype, "zp_dtype": dtype}
    return QuantizationArgs(num_bits=layout.format.bits, type="float", symmetric=True, **sharing)
