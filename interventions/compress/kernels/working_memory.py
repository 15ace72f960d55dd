"""How much memory the work on one block may take, and what that leaves for activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from interventions.structure import Block, Placement
from interventions.types import InterventionError

CPU_BATCH = 16 << 20
"""What the activations of a batch may take on a CPU; larger batches leave its caches, and are slower."""
ACCELERATOR_BATCH = 2 << 30
LEAST_TOKENS = 512
"""Of a batch where there is no budget; with fewer, most time goes into reading the weights."""
CPU_KEPT = 1 << 30
"""What may be kept of a block's activations so as not to compute it again."""
ACCELERATOR_KEPT = 8 << 30


class WorkingMemory(NamedTuple):
    """Bytes that the work on one block may use."""

    batch: int
    """For the activations of a batch."""
    least_tokens: int
    """Of a batch, whatever memory they take."""
    kept: int
    """For what is kept of activations, lest it be computed again."""
    hidden: int | None
    """For hidden states; where they take more they wait on the host. None: no bound."""

    def where_to_rest(self, hidden: int, device: torch.device) -> torch.device:
        """Return where `hidden` bytes of hidden states stay while they are not computed with."""
        return device if self.hidden is None or hidden <= self.hidden else torch.device("cpu")


def working_memory(blocks: Sequence[Block], where: Placement, method: str) -> WorkingMemory:
    """Divide up the memory: without a budget by what suits the device.

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
    """Return what a block takes in float32 with its Gram matrices, and as much again."""
    weights = sum(parameter.numel() for parameter in block.module.parameters())
    grams = sum(group.in_features**2 for group in block.linear_groups)
    return 2 * 4 * (weights + grams)
