"""The files that settings name: where they lie and what they contain. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.hub import MODEL, AbsentError, commit, local_copy
from interventions.checkpoint.reading.kinds import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    HUB_ID,
    ReadingError,
    sources,
    weight_files,
)

_NEVER_READ = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
_WEIGHTS = ("*.safetensors", "*.gguf", "*.safetensors.index.json", "config.json", "quant*config.json")


def is_path(name: str, path: Path) -> bool:
    """Return whether `name`, which stands for `path`, is no hub id: not a valid one, or its parent folder exists."""
    if not HUB_ID.fullmatch(name) or (os.sep != "/" and os.sep in name):
        return True
    return "/" in name and path.parent.is_dir()


def local(name: str, folder: Path) -> Path | None:
    """Return the path that `name` stands for, relative to `folder`; None for a hub id."""
    path = folder / os.path.expanduser(name)
    return path if path.exists() or is_path(name, path) else None


def checkpoint_content(name: str, revision: str | None, folder: Path) -> str:
    """Return what identifies the weights of a checkpoint: the hash of its files, or the hub's commit.

    Other files, such as optimizer states and model cards, do not count. An adapter's base model does.
    """
    path = local(name, folder)
    if path is None:
        try:
            return commit(name, revision)
        except AbsentError:  # the step says so
            return f"absent: {name}@{revision}"
    if path.is_file():
        return hash_files([path])
    found = hash_files(file for pattern in (*_WEIGHTS, ADAPTER) for file in sorted(path.glob(pattern)))
    with suppress(ReadingError):  # reading it says so
        for base in sources(path)[1:2]:
            found += f" on {checkpoint_content(base, None, path)}"
    return found


def model_content(location: str, revision: str | None) -> str:
    """Return what identifies everything that reading a model and its tokenizer reads, except code of its own.

    That is the hash of its files, or the hub's commit, with that of an adapter's base model. Downloads a hub id; raises
    ReadingError.
    """
    place = local_copy(location, revision)
    if place.is_file():
        return hash_files([place])
    found = place.name
    if place == Path(location):
        files = {file for file in place.iterdir() if file.is_file() and file.suffix not in _NEVER_READ}
        with suppress(ReadingError):  # reading it says so
            files |= {*weight_files(place).values(), *place.rglob("*.jinja")}
        found = hash_files(sorted(files))
    for base in sources(place)[1:2]:
        found += f" on {model_content(base, adapter_config(place).get('revision'))}"
    return found


def adapter_content(name: str, revision: str | None, folder: Path) -> str:
    """Return what identifies a PEFT adapter without its base model: the hash of its files, or the hub's commit."""
    path = local(name, folder)
    if path is not None:
        return hash_files([path / ADAPTER, path / ADAPTER_WEIGHTS])
    try:
        return commit(name, revision)
    except AbsentError:  # the step says so
        return f"absent: {name}@{revision}"


def adapter_config(path: Path) -> dict[str, Any]:
    """Return the config of a PEFT adapter, empty if it cannot be read."""
    try:
        found = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fetched(name: str, revision: str | None, folder: Path, files: Collection[str] = MODEL) -> tuple[Path, str | None]:
    """Return the folder that `name` stands for, in the hub's cache for a hub id, and the commit there.

    Downloads what matches `files`, globs, of a hub id; raises InterventionError.
    """
    path = local(name, folder)
    if path is not None:
        return path, None
    copy = local_copy(name, revision, files)
    return copy, copy.name


def hash_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files, and of the files in folders with their relative names.

    A missing path counts as an empty folder. Contents are hashed once per process, unless size or time change.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in _files(path):
            name = file.relative_to(path) if file != path else Path(path.name)
            digest.update(f"{name.as_posix()}\n{_digest_of(file)}\n".encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or the files of a folder without hidden ones and __pycache__."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            yield file


def _digest_of(path: Path) -> str:
    found = path.stat()
    return _digest(str(path.resolve()), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
