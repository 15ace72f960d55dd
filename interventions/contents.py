"""The files that settings name: where they lie and what they contain. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.kinds import ADAPTER, ADAPTER_WEIGHTS, HUB_ID, ReadingError, sources
from interventions.types import InterventionError

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
            return hub_commit(name, revision)
        except InterventionError:  # the step says so
            return f"absent: {name}@{revision}"
    if path.is_file():
        return hash_files([path])
    found = hash_files(file for pattern in (*_WEIGHTS, ADAPTER) for file in sorted(path.glob(pattern)))
    with suppress(ReadingError):  # reading it says so
        for base in sources(path)[1:2]:
            found += f" on {checkpoint_content(base, None, path)}"
    return found


def adapter_content(name: str, revision: str | None, folder: Path) -> str:
    """Return what identifies a PEFT adapter without its base model: the hash of its files, or the hub's commit."""
    path = local(name, folder)
    if path is not None:
        return hash_files([path / ADAPTER, path / ADAPTER_WEIGHTS])
    try:
        return hub_commit(name, revision)
    except InterventionError:  # the step says so
        return f"absent: {name}@{revision}"


def adapter_config(path: Path) -> dict[str, Any]:
    """Return the config of a PEFT adapter, empty if it cannot be read."""
    try:
        found = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def hub_commit(name: str, revision: str | None) -> str:
    """Return the commit of a model or adapter on the hub, or in its cache.

    Raises InterventionError if neither has it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    problem: Exception | None = None
    for file in ("config.json", ADAPTER):
        try:
            return Path(hf_hub_download(name, file, revision=revision)).parent.name
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:  # the hub and its client raise all kinds
            problem = error
            break
    raise InterventionError(
        f"{name!r} is not a local folder, and the hub or its cache does not have it ({type(problem).__name__}): name a "
        "local folder, or set HF_HOME to a cache that contains it"
    )


def fetched(name: str, revision: str | None, folder: Path, *files: str) -> tuple[Path, str | None]:
    """Return the folder that `name` stands for, in the hub's cache for a hub id, and the commit there.

    Downloads what matches `files` (globs) at the top of the repository; raises InterventionError.
    """
    path = local(name, folder)
    if path is not None:
        return path, None
    from huggingface_hub import snapshot_download

    commit = hub_commit(name, revision)
    only: Any = {"revision": commit, "allow_patterns": list(files), "ignore_patterns": "*/*"}
    try:
        return Path(snapshot_download(name, **only)), commit
    except Exception as error:  # the hub and its client raise all kinds
        with suppress(Exception):
            return Path(snapshot_download(name, local_files_only=True, **only)), commit
        reason = " ".join(str(error).split())[:300]
        raise InterventionError(f"{name} cannot be downloaded: {type(error).__name__}: {reason}") from error


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
