"""Check a model's folder for missing, truncated or unsupported files before loading it. Imports no torch.

Only the headers of safetensors files are read, so a folder of hundreds of gigabytes takes milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_lmcompose.errors import ModelError

WEIGHTS = "model.safetensors"
_INDEX = f"{WEIGHTS}.index.json"
_OPTIONAL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json", "tokenization_*.py")
_LONGEST_HEADER = 100 * 2**20
"""Bytes; the limit of the format."""
_LFS = b"version https://git-lfs"


def check_folder(folder: Path, *, tokenizer: bool = True) -> None:
    """Raise ModelError for the first problem that prevents loading a model, with its `tokenizer`, from `folder`."""
    if folder.is_file():
        kind = "a GGUF file" if folder.suffix == ".gguf" else "a file"
        raise ModelError(f"{folder} is {kind}: name a folder with config.json and {WEIGHTS}")
    if not (folder / "config.json").is_file():
        raise ModelError(_without_config(folder))
    config = _object(folder / "config.json")
    if "model_type" not in config and "auto_map" not in config:
        raise ModelError(f"{folder / 'config.json'} has no model_type: it is not the config of a transformers model")
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{folder / 'config.json'}: the weights are stored quantised (quant_method {method!r}), but steps need "
            "full-precision weights; use the original model, or a de-quantised copy"
        )
    for name in _OPTIONAL:
        if (folder / name).exists():
            _object(folder / name)
    for path in _weight_files(folder):
        _check_safetensors(path)
    if tokenizer and not any(found for pattern in _TOKENIZERS for found in folder.glob(pattern)):
        raise ModelError(f"{folder} has no tokenizer: save the model's own there with tokenizer.save_pretrained")


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is a PEFT adapter, not a model: load it with its base model, call merge_and_unload(), and "
            "save the merged model"
        )
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files: convert the model to a folder with config.json and {WEIGHTS}"
    return f"the model folder {folder} has no config.json"


def _weight_files(folder: Path) -> Iterator[Path]:
    """Yield the weight files, in the order in which transformers looks for them."""
    if (folder / WEIGHTS).exists():
        yield folder / WEIGHTS
        return
    if not (folder / _INDEX).exists():
        found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        if any(not name.endswith(".safetensors") for name in found):
            raise ModelError(
                f"{folder} has no {WEIGHTS}, only {found[0]}, which can run code when it is read: load it where you "
                "trust it and save it again with save_pretrained"
            )
        instead = f", but {found[0]}" if found else ""
        raise ModelError(f"{folder} has no weights: neither {WEIGHTS} nor {_INDEX}{instead}")
    shards = _object(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{folder / _INDEX} has no weight_map from tensors to files; download it again")
    for name in dict.fromkeys(shards.values()):
        path = folder / name
        if not path.exists():
            raise ModelError(f"{path} is missing, but {_INDEX} lists it; download it again")
        held = _header(path)
        absent = next((tensor for tensor, shard in shards.items() if shard == name and tensor not in held), None)
        if absent is not None:
            raise ModelError(f"{path} has no tensor {absent}, but {_INDEX} lists it; download both again")
        yield path


def _check_safetensors(path: Path) -> None:
    """Raise ModelError if the size of a file does not match its header."""
    tensors = _header(path)
    try:
        end = max((tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"), default=0)
    except (TypeError, KeyError, IndexError):
        raise ModelError(f"{path} is damaged: its header does not describe tensors; download it again") from None
    expected = 8 + _header_length(path) + end
    if (size := path.stat().st_size) != expected:
        raise ModelError(f"{path} is damaged: {size} bytes instead of {expected}; download it again")


def _header(path: Path) -> dict[str, Any]:
    length = _header_length(path)
    with path.open("rb") as stream:
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged: its header cannot be read; download it again")
    return header


def _header_length(path: Path) -> int:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if start == _LFS:
        raise ModelError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(_LONGEST_HEADER, path.stat().st_size - 8):
        raise ModelError(f"{path} is damaged or not a safetensors file; download it again")
    return length


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({' '.join(str(error).split())}); download it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is a JSON {type(found).__name__}, expected an object; download it again")
    return found
