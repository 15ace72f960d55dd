"""Packed folders, and the published layouts read by independent formulations."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pytest_lmcompose.checkpoints.packing import Packing, plan_packing


def write_packed(
    model: Any, folder: Path, format: str, moved: Callable[[str], str | None] = lambda name: None
) -> Packing:
    """Write a model to a new folder as a format stores it."""
    packing = plan_packing(model, format, moved)
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        tensors |= packing.replace(name, weight) if packing.packs(name) else {name: weight.detach().contiguous()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "quantization_config": packing.config,
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return packing


def unpacked(model: Any, packing: Packing) -> Any:
    """Return a copy of a model with the weights that a loader computes."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in result.named_parameters():
            if packing.packs(name):
                weight.copy_(packing.unpacked(name, weight))
    return result


def dequantised_gptq(stored: dict[str, Tensor], bits: int) -> Tensor:
    """Return the weight (out, in) of a layer of version 1: every row and column is one stream of bits."""
    levels = _stream(stored["qweight"].t(), bits)
    zeros = _stream(stored["qzeros"], bits) + 1
    groups = stored["g_idx"].long()
    return (levels - zeros.t()[:, groups]).float() * stored["scales"].float().t()[:, groups]


def dequantised_awq(stored: dict[str, Tensor]) -> Tensor:
    """Return the weight (out, in): nibbles 0, 4, 1, 5, 2, 6, 3, 7 of a word are neighbours."""
    levels, zeros = (_nibbles(stored[name]) for name in ("qweight", "qzeros"))
    width = len(levels) // len(zeros)
    scales = stored["scales"].float().repeat_interleave(width, dim=0)
    return ((levels - zeros.repeat_interleave(width, dim=0)).float() * scales).t()


def _stream(words: Tensor, bits: int) -> Tensor:
    """Read rows of words as streams of bits, the lowest first: (rows, words * 32 / bits)."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return torch.from_numpy(stream.astype(np.int64) @ (1 << np.arange(bits)))


def _nibbles(words: Tensor) -> Tensor:
    nibbles = [(words >> (4 * place)) & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)]
    return torch.stack(nibbles, dim=2).flatten(1)
