"""Trial runs of single blocks: float32 copies, and how far outputs moved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interventions.compress.kernels.precision import matmul_precision
from interventions.structure import Block, module_device, placement

TOLERANCE = 1e-3
"""Greatest change in float32: of a block's output in the new basis, relative to what the block adds to the stream, of
the embeddings and of the logits. Right rotations are below 1e-4, wrong ones above 0.1."""


def work_device(model: nn.Module, block: Block) -> torch.device:
    """Return the device that computes a block."""
    where = placement(model)
    return where.device if where.streamed else module_device(block.module)


@contextmanager
def float_copy(model: nn.Module, block: Block, *, write: bool = False) -> Iterator[Block]:
    """Yield a float32 copy of a block, on the device that computes it; `write` stores its weights at the end."""
    work = copy.deepcopy(block)
    work.module.to(work_device(model, block)).float().eval()
    with matmul_precision("highest"):
        yield work
    if write:
        for stored, new in zip(block.module.parameters(), work.module.parameters(), strict=True):
            stored.copy_(new)


def precise(Q: Tensor, device: torch.device) -> Tensor:
    """Return a matrix on a device in float64, or what the device has."""
    return Q.to(device, torch.float32 if device.type == "mps" else torch.float64)


def moved(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Return the norm of the difference of two outputs, over that of `scale`."""
    return float((found - wanted).norm() / scale.norm().clamp(min=torch.finfo(torch.float32).tiny))
