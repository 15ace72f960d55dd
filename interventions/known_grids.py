"""How a checkpoint stored a weight, for weights whose values do not show it. Imports torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KnownGrid:
    """How a weight was stored."""

    bits: int
    """Bits of a code."""
    group_size: int
    """Columns per scale; all columns for whole rows."""
    groups: int
    """Number of scales."""
    overhead_bits: int
    """All that is stored beside the codes: scales, zero points, column order, padding."""
    digest: str
    """`tensor_digest` of the de-quantised weight (out, in) as it was loaded."""


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and values."""
    tensor = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
