"""A cache of input statistics, shared by all steps that start from the same state of a model.

Entries are keyed by the hash of the weights, the hash of the token batches, the kind of pass and the linear, so
steps produce bit-identical weights with and without the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from interventions.statistics import Batch, InputMaxima, InputNorms, InputStatistics, collect_statistics
from interventions.structure import Block, Linear, LinearGroup, Memory, module_device, streaming

Sums = TypeVar("Sums", InputStatistics, InputNorms, InputMaxima)
Entry = InputStatistics | InputNorms | InputMaxima


class Key(NamedTuple):
    """Identifies an entry."""

    state: str
    """Hash of the weights."""
    tokens: str
    """Hash of the token batches."""
    pass_: str
    """Kind of pass: in the dtype of the weights, or block by block in float32."""
    name: str
    """The first linear with this input."""


class StatisticsCache:
    """Entries of several states in host memory, up to `limit` bytes.

    A full cache drops the least recently written states, then stops storing entries of the current one.
    """

    def __init__(self, limit: int = 1 << 29) -> None:
        self.limit = limit
        self._states: OrderedDict[str, dict[Key, Entry]] = OrderedDict()
        self.bytes = 0

    def of(self, state: str) -> SharedStatistics:
        """Return the entries of one state, by the hash of its weights."""
        return SharedStatistics(self, state)

    def forget(self, state: str) -> None:
        """Free the entries of a state."""
        self.bytes -= sum(bytes_of(entry) for entry in self._states.pop(state, {}).values())

    def get(self, key: Key) -> Entry | None:
        """Return an entry or None; do not change it."""
        return self._states.get(key.state, {}).get(key)

    def put(self, key: Key, entry: Entry) -> None:
        """Store an entry if there is room."""
        entry = entry.to(torch.device("cpu"))
        size = bytes_of(entry)
        self._states.setdefault(key.state, {})
        self._states.move_to_end(key.state)
        old = self._states[key.state].pop(key, None)
        self.bytes -= bytes_of(old) if old is not None else 0
        while self.bytes + size > self.limit and next(iter(self._states)) != key.state:
            _, dropped = self._states.popitem(last=False)
            self.bytes -= sum(bytes_of(other) for other in dropped.values())
        if self.bytes + size <= self.limit:
            self._states[key.state][key] = entry
            self.bytes += size


@dataclasses.dataclass(frozen=True)
class SharedStatistics:
    """The entries of one state."""

    cache: StatisticsCache
    state: str


Collect = Callable[[nn.Module, Sequence[Batch], Sequence[Any]], dict[str, InputStatistics]]


def collect_shared(
    shared: SharedStatistics | None,
    model: nn.Module,
    batches: Sequence[Batch],
    linears: Sequence[Linear | Memory],
    collect: Collect = collect_statistics,
    pass_: str = "as the model runs",
) -> dict[str, InputStatistics]:
    """Return what `collect` returns, from the cache where possible; do not change it. `pass_` says what it collects."""
    if shared is None:
        with streaming(model, on=True):
            fresh = collect(model, batches, linears)
        return {linear.name: fresh[linear.name].to(module_device(linear.module)) for linear in linears}
    tokens = hash_batches(batches)
    keys = {linear.name: Key(shared.state, tokens, pass_, linear.name) for linear in linears}
    found: dict[str, Any] = {name: shared.cache.get(key) for name, key in keys.items()}
    missing = [linear for linear in linears if found[linear.name] is None]
    with streaming(model, on=True):
        fresh = collect(model, batches, missing)
    for name, entry in fresh.items():
        shared.cache.put(keys[name], entry)
    return {
        linear.name: (found[linear.name] or fresh[linear.name]).to(module_device(linear.module)) for linear in linears
    }


class BlockStatistics:
    """Cached input statistics of a state's blocks, run one by one in float32 on some token batches.

    Only statistics that do not depend on the step are cached: those of the first block, and of all blocks if
    `sequential` is off.
    """

    def __init__(
        self, shared: SharedStatistics | None, batches: Sequence[Batch], *, sequential: bool, every: bool = False
    ) -> None:
        """With `every`, the statistics are those of experts that every token reaches."""
        self._shared = shared
        self._sequential = sequential
        self._pass = "float32 blocks, every expert" if every else "float32 blocks"
        self._tokens = "" if shared is None else hash_batches(batches)

    def cover(self, blocks: Sequence[Block], kind: type) -> bool:
        """Return whether the statistics of every group of every block are cached."""
        return self._shared is not None and all(
            self._get(group, kind) is not None for block in blocks for group in block.linear_groups
        )

    def find(
        self, block: Block, groups: Sequence[LinearGroup], kind: type[Sums], device: torch.device
    ) -> dict[str, Sums]:
        """Return the cached statistics of a block's groups, by key; do not change them."""
        if not self._cacheable(block):
            return {}
        found: dict[str, Any] = {group.key: self._get(group, kind) for group in groups}
        return {key: entry.to(device) for key, entry in found.items() if entry is not None}

    def keep(self, block: Block, entries: dict[str, Sums]) -> None:
        """Store statistics of an unchanged block, by key."""
        if self._shared is not None and self._cacheable(block):
            groups = {group.key: group for group in block.linear_groups}
            for key, entry in entries.items():
                self._shared.cache.put(self._key(self._shared, groups[key], type(entry)), entry)

    def _cacheable(self, block: Block) -> bool:
        return self._shared is not None and (block.index == 0 or not self._sequential)

    def _get(self, group: LinearGroup, kind: type) -> Entry | None:
        if self._shared is None:
            return None
        entry = self._shared.cache.get(self._key(self._shared, group, kind))
        if entry is None and kind is InputNorms:  # InputStatistics include the norms
            larger = self._shared.cache.get(self._key(self._shared, group, InputStatistics))
            return InputNorms(larger.square_sum, larger.count) if isinstance(larger, InputStatistics) else None
        return entry

    def _key(self, shared: SharedStatistics, group: LinearGroup, kind: type) -> Key:
        return Key(shared.state, self._tokens, f"{self._pass}, {kind.__name__}", group.linears[0].name)


def hash_batches(batches: Sequence[Batch]) -> str:
    """Return the SHA-256 of token batches, including padding and batch boundaries."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def bytes_of(entry: Entry) -> int:
    """Return the size of an entry in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.tensors)
