"""Divide the memory for the work on one block between activations and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from interventions.structure import Block, Placement
from interventions.types import InterventionError

CPU_BATCH = 16 << 20
"""Bytes for a batch's activations on a CPU; larger batches do not fit its caches and are slower."""
ACCELERATOR_BATCH = 2 << 30
LEAST_TOKENS = 512
"""Minimum tokens per batch without a budget; with fewer, most time is spent reading the weights."""
CPU_KEPT = 1 << 30
"""Bytes for a block's activations that are kept for later passes."""
ACCELERATOR_KEPT = 8 << 30


class WorkingMemory(NamedTuple):
    """Bytes that the work on one block may use."""

    batch: int
    """Bytes for the activations of a batch."""
    least_tokens: int
    """Minimum tokens per batch, whatever memory they need."""
    kept: int
    """Bytes for activations that are kept for later passes."""
    hidden: int | None
    """Bytes for hidden states; if they need more, they stay on the host. None: no limit."""

    def where_to_rest(self, hidden: int, device: torch.device) -> torch.device:
        """Return the device that stores `hidden` bytes of hidden states between passes."""
        return device if self.hidden is None or hidden <= self.hidden else torch.device("cpu")


def working_memory(blocks: Sequence[Block], where: Placement, method: str) -> WorkingMemory:
    """Divide the memory; without a budget, by defaults for the device.

    Of a budget the largest block comes first, in float32, with its Gram matrices and as much again for
    the method's own work. Raises InterventionError where nothing is left then.
    """
    on_cpu = where.device.type == "cpu"
    batch = CPU_BATCH if on_cpu else ACCELERATOR_BATCH
    if where.budget is None:
        return WorkingMemory(batch, LEAST_TOKENS, CPU_KEPT if on_cpu else ACCELERATOR_KEPT, None)
    needed, block = max(((bytes_for(block), block) for block in blocks), key=lambda pair: pair[0])
    left = where.budget - needed
    if left <= 0:
        raise InterventionError(
            f"{method}: the memory budget of {where.budget / 2**30:.3g} GiB is too small for {block.name}, which needs "
            f"{needed / 2**30:.3g} GiB in float32 with its Gram matrices and the work on them: raise it "
            "(model.memory_budget in a recipe)"
        )
    return WorkingMemory(min(batch, max(1, left // 4)), 1, left // 4, left // 2)


def bytes_for(block: Block) -> int:
    """Return twice the bytes of a block in float32 with its Gram matrices."""
    weights = sum(parameter.numel() for parameter in block.module.parameters())
    grams = sum(group.in_features**2 for group in block.linear_groups)
    return 2 * 4 * (weights + grams)
