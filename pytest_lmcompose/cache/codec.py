"""Store tensors in less space without loss: quantised weights as codes and scales, pruned ones as a mask and values.

A weight is encoded only where that is smaller and decodes to the same bits. Imports torch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from evaluators.grids import find_grid, fit_steps

METADATA_KEY = "lmcompose"
_INTEGERS = {2: torch.int16, 4: torch.int32}
_CHUNK = 2**20  # values


class _Coded(NamedTuple):
    parts: dict[str, Tensor]
    about: dict[str, Any]


def encode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata for a safetensors file, which `decode` reads."""
    stored, about = {}, {}
    for name, tensor in tensors.items():
        coded = _smallest(tensor)
        if coded is None:
            stored[name] = tensor
        else:
            stored |= {f"{name}:{part}": value for part, value in coded.parts.items()}
            about[name] = coded.about
    return stored, {METADATA_KEY: json.dumps(about)}


def decode(stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return the tensors that `encode` took; raises ValueError or KeyError for an invalid file."""
    about = json.loads((metadata or {}).get(METADATA_KEY, "{}"))
    parts = {f"{name}:{part}" for name, fields in about.items() for part in fields["parts"]}
    tensors = {name: tensor for name, tensor in stored.items() if name not in parts}
    for name, fields in about.items():
        tensors[name] = _decode_one({part: stored[f"{name}:{part}"] for part in fields["parts"]}, fields)
    return tensors


def _smallest(tensor: Tensor) -> _Coded | None:
    """Return the first encoding of `tensor` that is smaller than it and exact, or None."""
    if not tensor.is_floating_point() or tensor.element_size() not in _INTEGERS or not tensor.numel():
        return None
    for coded in _candidates(tensor):
        coded.about.update(parts=list(coded.parts), dtype=str(tensor.dtype).removeprefix("torch."))
        size = sum(part.numel() * part.element_size() for part in coded.parts.values())
        if size < tensor.numel() * tensor.element_size() and _same_bits(_decode_one(coded.parts, coded.about), tensor):
            return coded
    return None


def _candidates(tensor: Tensor) -> Iterator[_Coded]:
    if tensor.ndim == 2 and bool(torch.isfinite(tensor).all()):
        for transposed in (False, True):  # Conv1D stores its weight as (in, out)
            weight = tensor.t().contiguous() if transposed else tensor
            grid = find_grid(weight)
            if grid is not None:
                yield _on_grid(weight, 2**grid.bits, grid.group_size, transposed)
    yield _masked(tensor)


def _on_grid(weight: Tensor, levels: int, size: int, transposed: bool) -> _Coded:
    """Encode a weight (out, in) as integers times the scale of their group of `size` columns."""
    rows, cols = weight.shape
    groups = pad(weight, (0, -cols % size)).reshape(-1, size)
    coded = [_encode_groups(part, levels) for part in torch.split(groups, max(1, _CHUNK // size))]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*coded, strict=True))
    codes = codes.reshape(rows, -1)[:, :cols]
    about = {"codec": "grid", "shape": [rows, cols], "size": size, "transposed": transposed}
    return _Coded({"codes": _deflate(codes), "scales": scales, "zeros": _deflate(zeros)}, about)


def _encode_groups(groups: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (n, width), scales (n,) and zeros (n,): `groups` is (codes - zeros) * scales, rounded."""
    magnitudes = groups.abs()
    greatest = magnitudes.amax(dim=1, keepdim=True).float()
    used = greatest.flatten() > 0
    steps = torch.ones_like(greatest)
    fitted = fit_steps(groups[used].float(), levels, torch.finfo(groups.dtype).eps)
    if fitted is not None:
        steps[used, 0] = fitted.steps
    numbers = (groups.float() / greatest.masked_fill(greatest == 0, 1) * steps).round_()
    zeros = -numbers.amin(dim=1, keepdim=True).clamp(max=0)
    # A scale is right if it rounds to every value: the scales that do so lie between these bounds.
    bits = magnitudes.view(_INTEGERS[groups.element_size()])
    exact, count = magnitudes.double(), numbers.abs().double()
    below = (exact + (bits - (bits > 0).to(bits.dtype)).view(groups.dtype).double()) / 2
    above = (exact + (bits + 1).view(groups.dtype).double()) / 2
    low = (below / count).nan_to_num_(nan=0, posinf=0).amax(dim=1)
    high = (above / count).nan_to_num_(nan=torch.inf, posinf=torch.inf).amin(dim=1)
    scales = torch.where(used, (low + high) / 2, 1).float()
    return (numbers + zeros).clamp_(0, 255).to(torch.uint8), scales, zeros.flatten().clamp(0, 255).to(torch.uint8)


def _masked(tensor: Tensor) -> _Coded:
    """Encode a tensor with many zeros as a mask and the other values; -0.0 is another value."""
    flat = tensor.contiguous().flatten()
    mask = flat.view(_INTEGERS[tensor.element_size()]) != 0
    packed = torch.from_numpy(np.packbits(mask.numpy()))
    return _Coded({"mask": packed, "values": flat[mask]}, {"codec": "mask", "shape": list(tensor.shape)})


def _decode_one(parts: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    shape, dtype = about["shape"], getattr(torch, about["dtype"])
    if about["codec"] == "mask":
        count = int(np.prod(shape))
        mask = torch.from_numpy(np.unpackbits(parts["mask"].numpy(), count=count).view(bool))
        flat = torch.zeros(count, dtype=dtype)
        flat[mask] = parts["values"]
        return flat.reshape(shape)
    if about["codec"] != "grid":
        raise ValueError(f"codec {about['codec']!r} is unknown")
    (rows, cols), size = shape, about["size"]
    codes = _inflate(parts["codes"]).reshape(rows, cols)
    numbers = pad(codes, (0, -cols % size)).reshape(-1, size).float()
    weight = numbers.sub_(_inflate(parts["zeros"]).unsqueeze(1)).mul_(parts["scales"].unsqueeze(1)).to(dtype)
    weight = weight.reshape(rows, -1)[:, :cols]
    return (weight.t() if about["transposed"] else weight).contiguous()


def _deflate(codes: Tensor) -> Tensor:
    """Compress bytes by how often each occurs: never more than the bits of the grid, and less where zeros prevail."""
    packer = zlib.compressobj(level=1, strategy=zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(codes.contiguous().numpy().data) + packer.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _inflate(data: Tensor) -> Tensor:
    try:
        return torch.frombuffer(bytearray(zlib.decompress(data.numpy().data)), dtype=torch.uint8)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = _INTEGERS[other.element_size()]
    return torch.equal(one.view(integers), other.contiguous().view(integers))
