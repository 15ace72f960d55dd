"""Write a model and its tokenizer as a folder that `from_pretrained` loads, one shard at a time. Imports torch.

Tied weights are stored once and weights under the names that transformers reads, through its own functions; so every
family it has is written as it is read.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interventions.checkpoint.reading.kinds import INDEX, WEIGHTS
from interventions.rounding import rounding_of
from pytest_lmcompose.build.load import hash_digests, tensor_digest
from pytest_lmcompose.checkpoints.packing import Packing
from pytest_lmcompose.checkpoints.run_time import check_storable
from pytest_lmcompose.checkpoints.stored_names import as_read, unsaved

SHARD_BYTES = 5 * 10**9
"""Default maximum size of a file of weights; a larger tensor has a file of its own."""
_LAYER = re.compile(r"(?:.*?\.)?\d+\.")
"""The start of a parameter's name, up to the number of its block."""


def write_checkpoint(
    folder: Path, model: Any, tokenizer: Any, packing: Packing | None = None, *, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write weights, config, generation config, tokenizer and the model's own code, if any, into an empty folder.

    Returns the hash of the weights that a loader gets, see `load.hash_weights`. The model does not change. Raises
    CheckpointError for a model that transformers cannot save.
    """
    if packing is None:
        check_storable(rounding_of(model), "full precision", ())
    write_settings(folder, model, tokenizer, None if packing is None else packing.config)
    state = model.state_dict()
    writer = _ShardWriter(folder, shard_bytes)
    names = _stored_names(model, dict(state))
    empty = {name: torch.empty_like(state[name], device="meta") for name in names}
    # Of a packed checkpoint, transformers reads merged weights, such as experts, as they are in the model, unless these
    # are packed, too: it does not merge them and starts with random ones.
    as_is = packing is not None and not packing.experts and len(as_read(model, empty)) != len(names)
    for group in ([name] for name in names) if as_is else _groups(model, empty):
        tensors: dict[str, Tensor] = {}
        for name in group:
            if packing is not None and packing.packs(name):
                tensors |= packing.replace(name, state[name])
            else:
                tensors[name] = state[name]
        for name, tensor in (tensors if as_is else as_read(model, tensors)).items():
            expert = packing is not None and name in packing.experts
            for part, value in (packing.replace(name, tensor) if packing and expert else {name: tensor}).items():
                writer.add(part, value)
    for name, tensor in (packing.beside(model.dtype) if packing is not None else {}).items():
        writer.add(name, tensor)
    writer.close()
    return _weights_hash(state, packing)


def write_settings(folder: Path, model: Any, tokenizer: Any, quantization: Mapping[str, Any] | None = None) -> None:
    """Write everything except the weights; `quantization` describes how they are packed."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization is not None:
        config.quantization_config = dict(quantization)
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        # Without the checks of its `save_pretrained`, which refuse the configs of some published models.
        model.generation_config.to_json_file(folder / "generation_config.json")
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer without the padding and truncation that its last call has left in it."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)


def _stored_names(model: Any, state: dict[str, Tensor]) -> list[str]:
    """Return the names in `state` to store: each tied weight once, under the name that transformers expects."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    try:
        return list(remove_tied_weights_from_state_dict(state, model))
    except RuntimeError as error:
        raise unsaved(model, error) from error


def _groups(model: Any, empty: dict[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of each block, and those outside of all blocks; a single group if blocks depend on each other.

    Only the weights of one group are converted at a time, because some conversions copy them. `empty` has the weights
    to store as meta tensors.
    """
    groups: dict[str, list[str]] = {}
    for name in empty:
        found = _LAYER.match(name)
        groups.setdefault(found[0] if found else "", []).append(name)
    parts = {
        name: tensor.shape
        for group in groups.values()
        for name, tensor in as_read(model, {name: empty[name] for name in group}).items()
    }
    whole = {name: tensor.shape for name, tensor in as_read(model, empty).items()}
    yield from groups.values() if parts == whole else [list(empty)]


def _weights_hash(state: Mapping[str, Tensor], packing: Packing | None) -> str:
    digests = {}
    for name, tensor in state.items():
        packed = packing is not None and packing.packs(name)
        digests[name] = tensor_digest(packing.unpacked(name, tensor) if packing is not None and packed else tensor)
    return hash_digests(digests | (packing.rounding.digests() if packing is not None else {}))


class _ShardWriter:
    """Collects tensors up to the size of a shard, and writes it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._files: list[list[str]] = []
        """The tensors of each file."""
        self._bytes = self._values = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor to the shard, or to a new one if it is full."""
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._size + size > self._limit:
            self._flush()
        self._shard[name] = tensor.detach().contiguous()
        self._size += size
        self._bytes += size
        self._values += tensor.numel()

    def close(self) -> None:
        """Write the last shard, name the files and write the index, if there are several."""
        self._flush()
        count = len(self._files)
        if count == 1:
            _name(self._folder, 1).rename(self._folder / WEIGHTS)
            return
        final = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(final, start=1):
            _name(self._folder, number).rename(self._folder / name)
        index = {
            "metadata": {"total_parameters": self._values, "total_size": self._bytes},
            "weight_map": {t: file for file, tensors in zip(final, self._files, strict=True) for t in tensors},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        self._files.append(list(self._shard))
        save_file(self._shard, _name(self._folder, len(self._files)), metadata={"format": "pt"})
        self._shard, self._size = {}, 0


def _name(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.safetensors"
