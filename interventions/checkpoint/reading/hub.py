"""Bring what a hub id names into the hub's cache, as a folder. Imports the hub's client on use, and no torch."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.kinds import ADAPTER, HUB_ID, ReadingError

_CODE = ("*.py", "*.jinja")
"""Globs of what may lie in folders of a repository; all else is read at its top only."""
SETTINGS = ("*.json", "*.model", "*.txt", "*.tiktoken", *_CODE)
"""Globs of everything except weights."""
MODEL = (*SETTINGS, "*.safetensors")


class AbsentError(ReadingError):
    """A path at which nothing is, or a hub id that neither the hub nor its cache knows."""


def local_copy(location: str, revision: str | None, files: Collection[str] = MODEL) -> Path:
    """Return `location` if it exists, otherwise what matches `files` of that hub id, in a folder named by the commit.

    Raises AbsentError, or ReadingError if a file cannot be downloaded.
    """
    if Path(location).exists():
        return Path(location)
    if not HUB_ID.fullmatch(location):
        raise AbsentError(f"there is no folder or file {location}")
    from huggingface_hub import snapshot_download

    found = commit(location, revision)
    others = ["consolidated*", *(f"*/{glob}" for glob in files if glob not in _CODE)]
    only: Any = {"revision": found, "allow_patterns": list(files), "ignore_patterns": others}
    try:
        return Path(snapshot_download(location, **only))
    except Exception as error:  # the hub and its client raise all kinds
        with suppress(Exception):
            return Path(snapshot_download(location, local_files_only=True, **only))
        raise ReadingError(f"{location} cannot be downloaded: {_line(error)}") from error


def commit(name: str, revision: str | None) -> str:
    """Return the commit of a model or adapter on the hub, or in its cache; raises AbsentError."""
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
    assert problem is not None
    raise AbsentError(
        f"{name!r} is not a local folder, and the hub or its cache does not have it ({_line(problem)}): name a local "
        "folder, or set HF_HOME to a cache that contains it"
    )


def _line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *(line[:150] for line in lines[:1])])
