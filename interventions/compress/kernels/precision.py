"""In which precision forward passes of float32 copies run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def pass_precision(device: torch.device, stored: torch.dtype) -> Iterator[None]:
    """Let a CUDA device multiply float32 matrices in TF32 meanwhile, where the model's weights are `stored` in 16 bits.

    TF32 rounds factors to 10 bits of mantissa and adds up in float32: weights in float16 or bfloat16 are factors
    as they are, and activations are rounded no more than the model itself rounds them. Passes and Gram matrices,
    most of a compress step's work, are several times faster; factorisations and updates of weights stay outside.
    """
    if device.type != "cuda" or stored.itemsize > 2:
        yield
        return
    with matmul_precision("high"):
        yield


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let torch multiply float32 matrices in this precision meanwhile, see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
