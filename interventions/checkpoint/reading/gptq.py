"""GPTQ checkpoints: AutoGPTQ's layout, which GPTQModel and optimum write too.

`qweight` (in * bits / 32, out) and `qzeros` (groups, out * bits / 32) are streams of bits in 32-bit words, down the
columns and along the rows; `scales` (groups, out); `g_idx` (in) is the group of each input. In the format `gptq`, zero
points are stored minus one; in `gptq_v2` they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interventions.checkpoint.reading.kinds import ReadingError, names_under
from interventions.checkpoint.reading.stored import Packed, Shards, unpack_bits

ROLES = ("qweight", "qzeros", "scales", "g_idx")


def find_packed(shards: Shards, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Return the packed weights of a checkpoint by name; raises ReadingError for shapes that contradict each other."""
    less_one = settings.get("checkpoint_format", "gptq") == "gptq"
    found = {}
    for name in names_under(shards, "qweight"):
        parts = {role: f"{name}.{role}" for role in ROLES if f"{name}.{role}" in shards}
        missing = [role for role in ("qzeros", "scales") if role not in parts]
        if missing:
            raise ReadingError(f"{name}.qweight has no {name}.{missing[0]}: the checkpoint is incomplete")
        (rows, outputs), (groups, _) = shards.shape(parts["qweight"]), shards.shape(parts["scales"])
        stream = rows * shards.bits(parts["qweight"]) // (rows * outputs)
        # Single layers can have other bits than the settings say, but their shapes tell.
        inputs = shards.shape(parts["g_idx"])[0] if "g_idx" in parts else stream // int(settings["bits"])
        bits = stream // inputs
        if not 2 <= bits <= 8 or shards.shape(parts["scales"])[1] != outputs or groups > inputs:
            raise ReadingError(
                f"{name}: qweight {shards.shape(parts['qweight'])}, scales {shards.shape(parts['scales'])} and "
                f"{inputs} inputs do not fit together; download the checkpoint again"
            )
        size = int(settings.get("group_size") or -1)
        size = size if size > 0 and -(-inputs // size) == groups else -(-inputs // groups)
        unpack = partial(unpack_weight, bits=bits, less_one=less_one, group_size=size)
        found[f"{name}.weight"] = Packed(parts, (outputs, inputs), bits, size, groups * outputs, unpack)
    return found


def unpack_weight(parts: Mapping[str, Tensor], *, bits: int, less_one: bool, group_size: int) -> Tensor:
    """Return the weight (out, in) of the tensors of a layer."""
    codes, scales = unpack_bits(parts["qweight"], bits), parts["scales"].float()
    zeros = unpack_zeros(parts["qzeros"], bits, less_one)[:, : scales.shape[1]]
    order = parts.get("g_idx")
    groups = torch.arange(len(codes)) // group_size if order is None else order.long()
    codes = codes[: len(groups)]
    weight = (codes.float() - zeros.float()[groups]) * scales[groups]
    return weight.t().contiguous()


def unpack_zeros(words: Tensor, bits: int, less_one: bool) -> Tensor:
    """Return zero points (groups, out) of the words (groups, out * bits / 32)."""
    width = 8 * words.element_size()
    if less_one and width % bits == 0:
        # Writers subtract one from every field of a word at once, so that a zero borrows from its neighbour.
        ones = sum(1 << place for place in range(0, width, bits))
        words = words + torch.tensor(ones - (1 << width if ones >> (width - 1) else 0), dtype=words.dtype)
        less_one = False
    zeros = unpack_bits(words.t(), bits).t()
    return (zeros + 1) & (2**bits - 1) if less_one else zeros
