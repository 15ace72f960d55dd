"""Check a model's folder for missing, truncated or unsupported files before loading it. Imports no torch.

Only the headers of safetensors files are read, so a folder of hundreds of gigabytes takes milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.kinds import (
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    ReadingError,
    check_readable,
    has_tokenizer,
    read_object,
    sources,
    weight_files,
)

_OPTIONAL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_LONGEST_HEADER = 100 * 2**20
"""Bytes; the limit of the format."""
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_LFS = b"version https://git-lfs"


def check_folder(folder: Path, *, tokenizer: bool = True) -> str | None:
    """Return the kind of a checkpoint, as `read_kind`; it may be a GGUF file, too.

    Raises ReadingError for the first problem that prevents reading a model, with its `tokenizer`, from `folder`.
    """
    kind = check_readable(folder)
    if kind == "gguf":
        return kind
    if folder.is_file():
        raise ReadingError(f"{folder} is a file: name a folder with config.json and {WEIGHTS}, or a GGUF file")
    for name in _OPTIONAL:
        if (folder / name).exists():
            read_object(folder / name)
    if kind == "peft":
        check_safetensors(folder / ADAPTER_WEIGHTS)
        base = Path(sources(folder)[1])
        if base.exists():
            check_folder(base, tokenizer=tokenizer)
    else:
        _check_model(folder, kind, tokenizer)
    return kind


def _check_model(folder: Path, kind: str | None, tokenizer: bool) -> None:
    if not (folder / "config.json").is_file():
        below = sorted((path.parent.name for path in folder.glob("*/config.json")), key=lambda name: (len(name), name))
        instead = f", but {below[-1]} in it has one: name that" if below else ""
        raise ReadingError(f"the model folder {folder} has no config.json{instead}")
    config = read_object(folder / "config.json")
    if "model_type" not in config and "auto_map" not in config:
        raise ReadingError(f"{folder / 'config.json'} has no model_type: it is not the config of a transformers model")
    for path in _weight_files(folder):
        tensors = check_safetensors(path)
        whole = (n for n, t in tensors.items() if n.endswith(".weight") and t["dtype"] in _INTEGERS)
        if kind is None and (name := next(whole, None)) is not None:
            raise ReadingError(
                f"{path} stores {name} as integers ({tensors[name]['dtype']}), but {folder / 'config.json'} has no "
                "quantization_config that gives their meaning; download both again"
            )
    if tokenizer and not has_tokenizer(folder):
        raise ReadingError(f"{folder} has no tokenizer: save the model's own there with tokenizer.save_pretrained")


def _weight_files(folder: Path) -> Iterator[Path]:
    """Yield the weight files, in the order in which transformers looks for them."""
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        if any(not name.endswith(".safetensors") for name in found):
            raise ReadingError(
                f"{folder} has no {WEIGHTS}, only {found[0]}, which can run code when it is read: load it where you "
                "trust it and save it again with save_pretrained"
            )
        instead = f", but {found[0]}" if found else ""
        raise ReadingError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}{instead}")
    shards = weight_files(folder)
    for path in dict.fromkeys(shards.values()):
        held = _header(path)
        absent = next((name for name, shard in shards.items() if name and shard == path and name not in held), None)
        if absent is not None:
            raise ReadingError(f"{path} has no tensor {absent}, but {INDEX} lists it; download both again")
        yield path


def check_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors in the header of a file; raises ReadingError if its size does not match them."""
    tensors = {name: tensor for name, tensor in _header(path).items() if name != "__metadata__"}
    try:
        end = max((tensor["data_offsets"][1] for tensor in tensors.values() if tensor["dtype"]), default=0)
    except (TypeError, KeyError, IndexError):
        raise ReadingError(f"{path} is damaged: its header does not describe tensors; download it again") from None
    expected = 8 + _header_length(path) + end
    if (size := path.stat().st_size) != expected:
        raise ReadingError(f"{path} is damaged: {size} bytes instead of {expected}; download it again")
    return tensors


def _header(path: Path) -> dict[str, Any]:
    length = _header_length(path)
    with path.open("rb") as stream:
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ReadingError(f"{path} is damaged: its header cannot be read; download it again")
    return header


def _header_length(path: Path) -> int:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        raise ReadingError(f"{path} cannot be read: {error.strerror}") from None
    if start == _LFS:
        raise ReadingError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(_LONGEST_HEADER, path.stat().st_size - 8):
        raise ReadingError(f"{path} is damaged or not a safetensors file; download it again")
    return length
