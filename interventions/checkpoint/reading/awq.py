"""AWQ checkpoints in version GEMM, AutoAWQ's layout.

`qweight` (in, out / 8) and `qzeros` (groups, out / 8) hold eight 4-bit numbers in a 32-bit word, in the order of
columns 0, 2, 4, 6, 1, 3, 5, 7; `scales` (groups, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interventions.checkpoint.reading.kinds import ReadingError, names_under
from interventions.checkpoint.reading.stored import Packed, Shards, unpack_bits

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each number in a word, from the lowest bits up."""
ROLES = ("qweight", "qzeros", "scales")


def find_packed(shards: Shards, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Return the packed weights of a checkpoint by name; raises ReadingError for shapes that contradict each other."""
    bits = int(settings.get("bits", settings.get("w_bit", 4)))
    if bits != 4:
        raise ReadingError(f"AWQ weights of {bits} bits cannot be read: the layout is known for 4 bits only")
    found = {}
    for name in names_under(shards, "qweight"):
        parts = {role: f"{name}.{role}" for role in ROLES}
        missing = [part for part in parts.values() if part not in shards]
        if missing:
            raise ReadingError(f"{name}.qweight has no {missing[0]}: the checkpoint is incomplete")
        (inputs, words), (groups, outputs) = shards.shape(parts["qweight"]), shards.shape(parts["scales"])
        if words * 32 // bits != outputs or inputs % groups:
            raise ReadingError(
                f"{name}: qweight {(inputs, words)} and scales {(groups, outputs)} do not fit together; download the "
                "checkpoint again"
            )
        size = inputs // groups
        unpack = partial(unpack_weight, group_size=size)
        found[f"{name}.weight"] = Packed(parts, (outputs, inputs), bits, size, groups * outputs, unpack)
    return found


def unpack_weight(parts: Mapping[str, Tensor], *, group_size: int) -> Tensor:
    """Return the weight (out, in) of the tensors of a layer."""
    codes, zeros = (_numbers(parts[role]).float() for role in ("qweight", "qzeros"))
    scales = parts["scales"].float()
    codes -= zeros.repeat_interleave(group_size, dim=0)
    codes *= scales.repeat_interleave(group_size, dim=0)
    return codes.t().contiguous()


def _numbers(words: Tensor) -> Tensor:
    """Return the numbers (n, out) of words (n, out / 8)."""
    stored = unpack_bits(words.t(), 4).t()
    columns = torch.arange(stored.shape[1]).reshape(-1, 8)
    numbers = torch.empty_like(stored)
    numbers[:, columns[:, list(ORDER)].reshape(-1)] = stored
    return numbers
