"""Checkpoints of transformers' fine-grained FP8: a float8 weight with a scale per block, per row, or one for all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from interventions.checkpoint.reading.kinds import ReadingError
from interventions.checkpoint.reading.stored import Packed, Shards

SUFFIX = "_scale_inv"


def find_packed(shards: Shards, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Return the packed weights of a checkpoint by name; raises ReadingError for shapes that contradict each other."""
    block = settings.get("weight_block_size")
    found = {}
    for stored in shards:
        if not stored.endswith(SUFFIX):
            continue
        name = stored.removesuffix(SUFFIX)
        if name not in shards:
            raise ReadingError(f"{stored} has no {name}: the checkpoint is incomplete")
        shape, scales = shards.shape(name), shards.shape(stored)
        size = _block(shape, scales, block)
        if size is None:
            raise ReadingError(
                f"{name} {shape} and its scales {scales} do not fit weight_block_size {block}; download the "
                "checkpoint again"
            )
        parts = {"weight": name, "scales": stored}
        found[name] = Packed(parts, shape, 8, size[1], prod(scales), partial(unpack_weight, block=size))
    return found


def _block(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """Return rows and columns of a block of the last two dimensions; None if the scales are of other blocks."""
    if len(scales) < 2 or block is None:
        rows = 1 if scales and scales[0] == shape[-2] and scales[0] > 1 else shape[-2]
        fits = all(width == 1 for width in scales) or (rows == 1 and all(width == 1 for width in scales[1:]))
        return (rows, shape[-1]) if fits else None
    expected = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return (int(block[0]), int(block[1])) if tuple(scales) == expected else None


def unpack_weight(parts: Mapping[str, Tensor], *, block: tuple[int, int]) -> Tensor:
    """Return the weight of the tensors of a layer."""
    weight, scales = parts["weight"].to(torch.float32), parts["scales"].to(torch.float32)
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    rows, columns = weight.shape[-2:]
    for dim, width, most in ((-2, block[0], rows), (-1, block[1], columns)):
        scales = scales.repeat_interleave(width, dim=dim).narrow(dim, 0, most)
    return weight * scales
