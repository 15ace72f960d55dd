"""Recognise how a checkpoint is stored, and check that it can be read. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from interventions.names import near_names
from interventions.types import InterventionError

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json", "tokenization_*.py")
"""Globs of a tokenizer's files."""
QUANTISED = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq")
"""Values of `quant_method` that can be read."""
BASE = "base_model_name_or_path"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_EARLIER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where quantisers wrote their settings before config.json had them."""
_PACKAGES = {"compressed-tensors": "compressed_tensors", "gguf": "gguf", "peft": "peft"}


class ReadingError(InterventionError):
    """A checkpoint that cannot be read; the message names the file, key or tensor and the fix."""


def read_kind(folder: Path) -> str | None:
    """Return how the model in a folder or file is stored.

    None means plain full-precision weights, or nothing known; otherwise it is one of `QUANTISED`, gguf or peft.
    Raises ReadingError for a quantisation that cannot be read.
    """
    if folder.is_file():
        return "gguf" if folder.suffix == ".gguf" else None
    plain = (folder / WEIGHTS).exists() or (folder / INDEX).exists()
    if not plain and (folder / ADAPTER).is_file():
        return "peft"
    if not plain and any(folder.glob("*.gguf")):
        return "gguf"
    settings = quantisation(folder)
    return None if settings is None else str(settings["quant_method"])


def quantisation(folder: Path) -> dict[str, Any] | None:
    """Return the quantisation settings of a folder, with their `quant_method`; None if its weights are plain.

    Raises ReadingError for a method that cannot be read.
    """
    file = folder / "config.json"
    found = read_object(file).get("quantization_config") if file.is_file() else None
    if found is None:
        for name, earlier in _EARLIER.items():
            if (folder / name).is_file() and file.is_file():
                return {**read_object(folder / name), "quant_method": earlier}
        return None
    settings = found if isinstance(found, dict) else {"quant_method": found}
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in QUANTISED:
        raise ReadingError(
            f"{file}: the weights are stored quantised (quant_method {method!r}), which cannot be read."
            f"{near_names(str(method), QUANTISED, cutoff=0.7)} Known: {', '.join(QUANTISED)}; use the original model, "
            "or a de-quantised copy"
        )
    return {**settings, "quant_method": method}


def check_readable(folder: Path) -> str | None:
    """Return the kind of a checkpoint, as `read_kind`; raise ReadingError for what prevents reading it.

    Reads JSON files only; the weights' own files are not checked.
    """
    kind = read_kind(folder)
    package = _PACKAGES.get(kind or "")
    if package is not None and find_spec(package) is None:
        how = "peft" if kind == "peft" else "pytest-lmcompose[checkpoints]"
        raise ReadingError(f'{folder} is stored as {kind}, which needs the package {kind}: pip install "{how}"')
    if kind == "peft":
        check_adapter(folder)
    elif kind == "gguf":
        gguf_file(folder)
    elif kind is not None:
        _check_settings(folder, quantisation(folder) or {})
    return kind


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ReadingError for variants of a quantisation whose layout is another one."""
    version = str(settings.get("version", "gemm")).lower()
    if settings["quant_method"] == "awq" and version != "gemm":
        raise ReadingError(f"{folder}: AWQ weights in version {version!r} cannot be read: save them in version 'gemm'")
    stored = settings.get("checkpoint_format", "gptq")
    if settings["quant_method"] == "gptq" and stored not in ("gptq", "gptq_v2"):
        raise ReadingError(
            f"{folder}: GPTQ weights with checkpoint_format {stored!r} cannot be read: save them as 'gptq' or 'gptq_v2'"
        )
    if settings["quant_method"] == "compressed-tensors":
        sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense" or settings.get("format") == "marlin-24":
            raise ReadingError(
                f"{folder}: sparse compressed-tensors weights ({settings.get('format')}, {sparse}) cannot be read: "
                "save the model without sparse compression"
            )
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise ReadingError(
                f"{folder}: its transform_config rotates activations while the model runs, which full-precision "
                "weights cannot express; use a checkpoint without transforms"
            )


def check_adapter(folder: Path) -> None:
    """Raise ReadingError if a PEFT adapter lacks its weights, or its base model."""
    check_adapter_weights(folder)
    for base in sources(folder)[1:]:
        if Path(base).exists():
            check_readable(Path(base))


def check_adapter_weights(folder: Path) -> None:
    """Raise ReadingError if a PEFT adapter lacks its weights, or has only pickled ones."""
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickled = folder / "adapter_model.bin"
        if pickled.exists():
            raise ReadingError(
                f"{folder} has only {pickled.name}, which can run code when it is read: load it where you trust it and "
                "save it again with save_pretrained"
            )
        raise ReadingError(f"{folder} has {ADAPTER} but no {ADAPTER_WEIGHTS}: save the adapter again")


def adapter_base(folder: Path) -> str:
    """Return the absolute folder or the hub id of the model that a PEFT adapter was trained on; raises ReadingError.

    A relative folder is looked up beside the adapter's files, then in its parent folder, then in the working folder.
    """
    file = folder / ADAPTER
    name = read_object(file).get(BASE)
    if not isinstance(name, str) or not name:
        raise ReadingError(f"{file} has no {BASE}: set it to the folder or hub id of the model it was trained on")
    places = (folder, folder.parent, Path.cwd())
    for place in places:
        if (found := place / Path(name).expanduser()).exists():
            return str(found.resolve())
    if not HUB_ID.fullmatch(name):
        raise ReadingError(
            f"{file}: there is no base model {name!r} (looked in {', '.join(map(str, places))}): set {BASE} to the "
            "folder or hub id of the model that the adapter was trained on"
        )
    return name


def sources(location: str | Path) -> tuple[str, ...]:
    """Return every folder, file or hub id that reading `location` reads: itself, then the bases of adapters."""
    found = [str(location)]
    while (folder := Path(found[-1])).is_dir() and read_kind(folder) == "peft":
        base = adapter_base(folder)
        if base in found or Path(base) == folder.resolve():
            raise ReadingError(f"{folder / ADAPTER}: its {BASE} leads back to the adapter; name the model")
        found.append(base)
    return tuple(found)


def tokenizer_source(location: str) -> tuple[str, str | None]:
    """Return where the tokenizer of a model is, and the GGUF file in it to read it from, if no other file has it."""
    places = sources(location)
    for place in places:
        folder = Path(place)
        if folder.is_file():
            return str(folder.parent), folder.name
        if not folder.is_dir() or has_tokenizer(folder):
            return place, None
    last = Path(places[-1])
    return places[-1], gguf_file(last).name if read_kind(last) == "gguf" else None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any(found for pattern in TOKENIZERS for found in folder.glob(pattern))


def gguf_file(location: Path) -> Path:
    """Return the GGUF file at `location`, which is it or a folder that holds it; raises ReadingError."""
    files = [location] if location.is_file() else sorted(location.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise ReadingError(f"{location} holds {len(files)} GGUF files ({names}): name one of them")
    with files[0].open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ReadingError(f"{files[0]} is damaged or not a GGUF file; download it again")
    return files[0]


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a folder of safetensors; empty values if only one file holds all."""
    if (folder / WEIGHTS).exists():
        return {"": folder / WEIGHTS}
    shards = read_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ReadingError(f"{folder / INDEX} has no weight_map from tensors to files; download it again")
    for name in dict.fromkeys(shards.values()):
        if not (folder / name).exists():
            raise ReadingError(f"{folder / name} is missing, but {INDEX} lists it; download it again")
    return {tensor: folder / name for tensor, name in shards.items()}


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ReadingError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReadingError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReadingError(f"{path} is not JSON ({' '.join(str(error).split())}); download it again") from None
    if not isinstance(found, dict):
        raise ReadingError(f"{path} is a JSON {type(found).__name__}, expected an object; download it again")
    return found


def names_under(names: Mapping[str, Any], suffix: str) -> Iterator[str]:
    """Yield the module names that have a tensor called `suffix`."""
    for name in names:
        if name.endswith(f".{suffix}"):
            yield name.removesuffix(f".{suffix}")
