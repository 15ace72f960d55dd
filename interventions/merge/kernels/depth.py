"""Numbers that change with the depth of a model. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from interventions.anatomy import find_anatomy


def depths(model: nn.Module) -> dict[str, float]:
    """Return the depth of every parameter: 0 in the first block and outside of blocks, 1 in the last.

    That of a single block is 1, as in mergekit.
    """
    blocks = find_anatomy(model).blocks
    last = len(blocks) - 1
    found = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for block in blocks:
        inside = (name for name in found if name.startswith(f"{block.name}."))
        found |= dict.fromkeys(inside, block.index / last if last else 1.0)
    return found


def at(value: Any, depth: float) -> float:
    """Return a number, or that between the numbers of a list at a depth from 0 to 1."""
    if not isinstance(value, Sequence):
        return float(value)
    place = depth * (len(value) - 1)
    low = min(int(place), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    return float(value[low] + (place - low) * (value[high] - value[low]))
