"""Matmul precision of forward passes in float32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def pass_precision(device: torch.device, stored: torch.dtype) -> Iterator[None]:
    """Use TF32 for float32 matmuls on a CUDA device if the model's weights are `stored` in 16 bits.

    TF32 has 10 bits of mantissa and accumulates in float32. Float16 and bfloat16 weights are exact in it, and
    activations are rounded no more than in the model itself. Passes and Gram matrices, most of the work of a compress
    step, become several times faster. Factorisations and weight updates stay in float32.
    """
    if device.type != "cuda" or stored.itemsize > 2:
        yield
        return
    with matmul_precision("high"):
        yield


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the float32 matmul precision temporarily, see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
