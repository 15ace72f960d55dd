"""What a model rounds while it runs, as compressed-tensors describes and stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interventions.compress.schemes import Scheme
from interventions.rounding import Cached, Rounded, Rounding
from pytest_lmcompose.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection


def check_storable(rounding: Rounding, format: str, packed: Collection[str]) -> None:
    """Raise CheckpointError for a rounding that a folder of this format does not describe; `packed` are modules."""
    if not rounding:
        return
    if format != "compressed-tensors":
        raise CheckpointError(
            f"{format}: the model rounds inputs of layers, or keys and values, as it runs, which only "
            "compressed-tensors describes: choose that format"
        )
    others = sorted(set(rounding.inputs) - set(packed))
    if others:
        raise CheckpointError(
            f"{format}: the inputs of {others[0]} are rounded as the model runs, but its weights are stored in full "
            "precision: quantise last"
        )


def arguments(scheme: Scheme) -> Any:
    """Return the `QuantizationArgs` of inputs, or of keys and values."""
    from compressed_tensors.quantization import QuantizationArgs

    found: dict[str, Any] = {"num_bits": scheme.bits, "type": "float" if scheme.floats else "int", "symmetric": True}
    if scheme.scales == "two-level":
        found |= {"strategy": "tensor_group", "group_size": scheme.group_size, "dynamic": "local"}
        found |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    elif scheme.scales == "power":
        found |= {"strategy": "group", "group_size": scheme.group_size, "dynamic": True}
        found |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    elif scheme.calibrated:
        found |= {"strategy": "tensor", "dynamic": False}
    elif scheme.group_size > 0:
        found |= {"strategy": "group", "group_size": scheme.group_size, "dynamic": True}
    else:
        found |= {"strategy": "token", "dynamic": True}
    return QuantizationArgs(**found)


def input_tensors(rounded: Rounded, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is stored beside a weight of a dtype."""
    if rounded.scale is None:
        return {}
    if rounded.scheme.scales == "two-level":
        return {"input_global_scale": torch.tensor([rounded.scale])}
    return {"input_scale": torch.tensor([rounded.scale], dtype=dtype)}


def cache_tensors(cached: Cached, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is stored in an attention module whose weights have a dtype."""
    both = {"k_scale": cached.keys, "v_scale": cached.values}
    return {name: torch.tensor([rounded.scale], dtype=dtype) for name, rounded in both.items()}
