"""Store tensors in less space without loss: quantised weights as codes and scales, pruned ones as a mask and values.

A weight is encoded only where that is smaller and decodes to the same bits. Imports torch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from evaluators.grids import GROUP_SIZES
from pytest_lmcompose.cache.steps import INTEGERS, find_steps

METADATA_KEY = "lmcompose"
_CHUNK = 2**18  # values
_SAMPLED = 2**13  # values, for the choice of an encoding
_PROBED = 64  # groups, for a first look
_LIKELY = 0.25  # share of them on a grid: half-precision values lie on one by chance, a few groups in a hundred


class _Coded(NamedTuple):
    parts: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def encode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata for a safetensors file, which `decode` reads."""
    stored, about = {}, {}
    for name, tensor in tensors.items():
        coded = _smaller(tensor)
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


def _smaller(tensor: Tensor) -> _Coded | None:
    """Return an encoding of `tensor` that is smaller than it and exact, or None."""
    if tensor.dtype not in INTEGERS or not tensor.numel():
        return None
    used = int(torch.count_nonzero(tensor))
    masked = used * tensor.element_size() + tensor.numel() / 8 + (tensor.numel() - used) / 8
    smallest = min(masked, tensor.numel() * tensor.element_size())
    layout = _layout(tensor, smallest / tensor.numel()) if tensor.ndim > 1 else None
    if layout is not None:
        coded = _on_steps(tensor, *layout)
    elif masked == smallest:
        coded = _masked(tensor)
    else:
        return None
    coded.parts.update(_signs(tensor))
    coded.about.update(
        parts=list(coded.parts), dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape)
    )
    smaller = coded.size < tensor.numel() * tensor.element_size()
    return coded if smaller and _same_bits(_decode_one(coded.parts, coded.about), tensor) else None


def _layout(tensor: Tensor, limit: float) -> tuple[int, bool] | None:
    """Return the group size, and whether to transpose, with fewest bytes on a sample; None for `limit` or more."""
    best = None
    for transposed in (False, True):  # Conv1D stores its weight as (in, out)
        matrix = tensor.mT if transposed else tensor
        cols = matrix.shape[-1]
        rows = _sample(matrix, max(8, _SAMPLED // cols))
        probed = _groups(rows, min(cols, GROUP_SIZES[0]))
        places = torch.linspace(0, len(probed) - 1, min(len(probed), _PROBED)).long()
        if int(find_steps(probed[places]).scales.count_nonzero()) < _LIKELY * len(places):
            continue
        for size in (*(size for size in GROUP_SIZES if size < cols), cols):
            spent = _on_steps(rows, size, False).size / rows.numel()
            if spent >= limit:
                break  # wider groups are no better
            limit, best = spent, (size, transposed)
    return best


def _sample(matrix: Tensor, count: int) -> Tensor:
    """Return up to `count` rows of a matrix, or of a stack of matrices."""
    stack = matrix.shape[:-1]
    total = int(np.prod(stack))
    places = torch.linspace(0, total - 1, min(total, count)).long()
    return matrix[torch.unravel_index(places, stack)]


def _groups(matrix: Tensor, size: int) -> Tensor:
    return pad(matrix, (0, -matrix.shape[-1] % size)).reshape(-1, size)


def _on_steps(tensor: Tensor, size: int, transposed: bool) -> _Coded:
    """Encode a weight as whole numbers times the scale of their group of `size` columns, other groups as they are."""
    groups = _groups(tensor.mT if transposed else tensor, size)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    zeros = torch.empty(len(groups), dtype=torch.uint8)
    scales = torch.empty(len(groups))
    count = max(1, _CHUNK // size)
    for start in range(0, len(groups), count):
        part = slice(start, start + count)
        numbers, scales[part] = find_steps(groups[part])
        codes[part] = numbers.to(torch.int16)  # modulo 256, so that zero is 0 in all groups
        zeros[part] = -numbers.amin(dim=1).clamp_(max=0)
    parts = {"codes": _deflate(codes), "scales": scales, "zeros": _deflate(zeros)}
    others = scales == 0
    if bool(others.any()):
        parts["others"] = groups[others]
    return _Coded(parts, {"codec": "levels", "size": size, "transposed": transposed})


def _from_steps(parts: Mapping[str, Tensor], about: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    shape, size = list(about["shape"]), about["size"]
    if about["transposed"]:
        shape[-2:] = shape[:-3:-1]
    codes, zeros = _inflate(parts["codes"]).reshape(-1, size), _inflate(parts["zeros"]).unsqueeze(1)
    scales = parts["scales"].unsqueeze(1)
    groups = torch.empty(codes.shape, dtype=dtype)
    count = max(1, _CHUNK // size)
    for start in range(0, len(groups), count):
        part = slice(start, start + count)
        groups[part] = (codes[part] + zeros[part]).float().sub_(zeros[part]).mul_(scales[part])
    if "others" in parts:
        groups[parts["scales"] == 0] = parts["others"]
    matrix = groups.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return (matrix.mT if about["transposed"] else matrix).contiguous()


def _masked(tensor: Tensor) -> _Coded:
    """Encode a tensor with many zeros as a mask and the other values."""
    flat = tensor.contiguous().flatten()
    mask = flat != 0
    packed = torch.from_numpy(np.packbits(mask.numpy()))
    return _Coded({"mask": packed, "values": flat[mask]}, {"codec": "mask"})


def _from_mask(parts: Mapping[str, Tensor], about: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    flat = torch.zeros(int(np.prod(about["shape"])), dtype=dtype)
    mask = np.unpackbits(parts["mask"].numpy(), count=len(flat)).view(bool)
    flat[torch.from_numpy(mask)] = parts["values"]
    return flat.reshape(about["shape"])


def _signs(tensor: Tensor) -> dict[str, Tensor]:
    """Encode which zeros are negative, as those are where a mask was multiplied with negative weights."""
    flat = tensor.contiguous().flatten()
    negative = flat[flat == 0].signbit()
    return {"signs": _deflate(torch.from_numpy(np.packbits(negative.numpy())))} if bool(negative.any()) else {}


def _sign_(tensor: Tensor, signs: Tensor) -> None:
    zeros = tensor.view(-1) == 0
    negative = np.unpackbits(_inflate(signs).numpy(), count=int(zeros.sum())).view(bool)
    tensor.view(-1)[zeros] = torch.where(torch.from_numpy(negative), -0.0, 0.0).to(tensor.dtype)


_DECODERS = {"levels": _from_steps, "mask": _from_mask}


def _decode_one(parts: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    if about["codec"] not in _DECODERS:
        raise ValueError(f"codec {about['codec']!r} is unknown")
    tensor = _DECODERS[about["codec"]](parts, about, getattr(torch, about["dtype"]))
    if "signs" in parts:
        _sign_(tensor, parts["signs"])
    return tensor


def _deflate(codes: Tensor) -> Tensor:
    """Compress bytes by how often each occurs: about the bits of the grid, and less where zeros prevail."""
    packer = zlib.compressobj(level=1, strategy=zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(codes.contiguous().numpy().data) + packer.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _inflate(data: Tensor) -> Tensor:
    try:
        return torch.frombuffer(bytearray(zlib.decompress(data.numpy().data)), dtype=torch.uint8)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = INTEGERS[other.dtype]
    return torch.equal(one.view(integers), other.contiguous().view(integers))
