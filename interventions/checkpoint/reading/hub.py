"""Bring checkpoints that transformers does not read by itself from the hub. Imports transformers on use."""

from __future__ import annotations

import json
from pathlib import Path

from interventions.checkpoint.reading.kinds import ADAPTER

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken")


def local_copy(location: str, revision: str | None) -> str:
    """Return a local folder for a hub id of a quantised model or an adapter; any other location as it is."""
    if Path(location).exists():
        return location
    config, adapter = (_file(location, name, revision) for name in ("config.json", ADAPTER))
    quantised = config is not None and "quantization_config" in json.loads(Path(config).read_text(encoding="utf-8"))
    if not quantised and (config is not None or adapter is None):
        return location
    from huggingface_hub import snapshot_download

    return str(snapshot_download(location, revision=revision, allow_patterns=list(_FILES)))


def _file(location: str, name: str, revision: str | None) -> str | None:
    """Return the local path of a file on the hub or in its cache, None if it is not there."""
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(
        location,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found
