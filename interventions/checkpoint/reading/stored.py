"""The tensors of a checkpoint, read one at a time when a model is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interventions.checkpoint.reading.kinds import ReadingError, weight_files


class Shards(Mapping[str, Any]):
    """The tensors in the safetensors files of a folder, by name, as slices that are read when indexed."""

    def __init__(self, folder: Path) -> None:
        """Read the headers; raises ReadingError for a missing file or tensor."""
        from safetensors import safe_open

        places = weight_files(folder)
        opened: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in dict.fromkeys(places.values())}
        if "" in places:
            only = opened[places[""]]
            self._holders = dict.fromkeys(only.keys(), only)
            return
        self._holders = {}
        held = {path: set(file.keys()) for path, file in opened.items()}
        for name, path in places.items():
            if name not in held[path]:
                raise ReadingError(f"{path} has no tensor {name}, but the index lists it; download both again")
            self._holders[name] = opened[path]

    def __getitem__(self, name: str) -> Any:
        return self._holders[name].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._holders[name].get_tensor(name)  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self[name].get_shape())

    def bits(self, name: str) -> int:
        """Return the size of a tensor in bits."""
        kind = str(self[name].get_dtype()).partition("_")[0]  # BF16, F8_E4M3, BOOL
        return prod(self.shape(name)) * int("".join(char for char in kind if char.isdigit()) or 8)


@dataclass(frozen=True)
class Packed:
    """A weight that a checkpoint stores as several tensors."""

    parts: Mapping[str, str]
    """Names of the tensors by role, such as scales."""
    shape: tuple[int, ...]
    """(out, in)."""
    bits: int
    group_size: int
    groups: int
    unpack: Callable[[Mapping[str, Tensor]], Tensor]
    """Returns the weight (out, in) in float32 from the tensors by role."""

    def read(self, shards: Shards) -> Tensor:
        """Return the de-quantised weight (out, in)."""
        return self.unpack({role: shards.read(name) for role, name in self.parts.items()})

    def overhead_bits(self, shards: Shards) -> int:
        """Return the stored bits that are not codes."""
        return sum(shards.bits(name) for name in self.parts.values()) - self.bits * prod(self.shape)


class Lazy:
    """A weight that is de-quantised when it is indexed, as transformers does with slices of files."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]

    def is_floating_point(self) -> bool:
        """Return True."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights are computed."""
        return torch.float32


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned integers of `bits` bits in the rows of `words`, as uint8 (n, columns).

    Down each column, `words` (rows, columns) are one stream of bits, lowest bits first; an integer may lie across two
    words.
    """
    width = 8 * words.element_size()
    words = words.to(torch.int64 if width == 64 else torch.int32)
    period = next(n for n in range(1, width + 1) if n * bits % width == 0)  # integers after which a word starts
    rows, columns = words.shape
    words = words.reshape(rows * width // (period * bits), period * bits // width, columns)
    found = torch.empty(len(words), period, columns, dtype=torch.uint8)
    for place in range(period):
        word, shift = divmod(place * bits, width)
        low = min(bits, width - shift)
        value = (words[:, word] >> shift) & (2**low - 1)
        if low < bits:
            value |= (words[:, word + 1] & (2 ** (bits - low) - 1)) << low
        found[:, place] = value
    return found.reshape(-1, columns)
