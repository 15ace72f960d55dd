"""Checkpoints of bitsandbytes, which need not be installed: 4 bits (nf4, fp4) and 8 bits.

8 bits: `weight` int8 and `SCB`, the largest magnitude of each row, which is 127 steps. 4 bits: `weight` holds two
numbers in a byte, the first in the upper half; `quant_map` has their 16 values, `absmax` the scale of each block of the
flattened weight. With double quantisation `absmax` holds numbers in turn: `nested_quant_map` has their values,
`nested_absmax` the scales of their blocks, and the state an offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interventions.checkpoint.reading.kinds import ReadingError
from interventions.checkpoint.reading.stored import Packed, Shards

_STATE = ".quant_state.bitsandbytes__"
_ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def find_packed(shards: Shards, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Return the packed weights of a checkpoint by name; raises ReadingError for an incomplete one."""
    found = {}
    for stored in shards:
        if _STATE in stored:
            name = stored.partition(_STATE)[0]
            found[name] = _four_bits(shards, name, stored)
        elif stored.endswith(".SCB"):
            name = f"{stored.removesuffix('.SCB')}.weight"
            parts = {"weight": name, "rows": stored}
            _check(shards, parts)
            shape = shards.shape(name)
            extra = f"{stored.removesuffix('.SCB')}.weight_format"
            parts |= {"format": extra} if extra in shards else {}
            found[name] = Packed(parts, shape, 8, shape[1], shape[0], unpack_eight_bits)
    return found


def _four_bits(shards: Shards, name: str, stored: str) -> Packed:
    state = json.loads(bytes(shards.read(stored).tolist()))
    parts = {"weight": name, "state": stored}
    parts |= {role: f"{name}.{role}" for role in _ROLES if "nested" not in role or "nested_offset" in state}
    _check(shards, parts)
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    groups = -(-shape[0] * shape[1] // block)
    return Packed(parts, shape, 4, block, groups, partial(unpack_four_bits, state=state))


def unpack_eight_bits(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) of the tensors of a layer."""
    return parts["weight"].float() * (parts["rows"].float() / 127).unsqueeze(1)


def unpack_four_bits(parts: Mapping[str, Tensor], *, state: Mapping[str, Any]) -> Tensor:
    """Return the weight (out, in) of the tensors of a layer."""
    scales = parts["absmax"]
    if "nested_offset" in state:
        scales = _scaled(parts["nested_quant_map"][scales.long()], parts["nested_absmax"], state["nested_blocksize"])
        scales = scales + state["nested_offset"]
    packed = parts["weight"].reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    count = state["shape"][0] * state["shape"][1]
    values = parts["quant_map"].float()[codes.long()][:count]
    weight = _scaled(values, scales.float(), state["blocksize"]).reshape(state["shape"])
    # bitsandbytes computes in the dtype that the weight had.
    return weight.to(getattr(torch, state["dtype"])).float()


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    return values * scales.repeat_interleave(block)[: len(values)]


def _check(shards: Shards, parts: Mapping[str, str]) -> None:
    missing = [part for part in parts.values() if part not in shards]
    if missing:
        raise ReadingError(f"{parts['weight']} has no {missing[0]}: the checkpoint is incomplete")
