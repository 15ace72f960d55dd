"""Read a model of any kind. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interventions.checkpoint.reading import adapter, gguf_file
from interventions.checkpoint.reading.hub import local_copy
from interventions.checkpoint.reading.kinds import check_readable
from interventions.checkpoint.reading.model import read_plain, read_quantised
from interventions.checkpoint.reading.quiet import quiet
from interventions.known_grids import KnownGrid


def read(location: str, options: dict[str, Any]) -> tuple[Any, dict[str, KnownGrid]]:
    """Return a model and its grids; see `interventions.checkpoint.reading.read_model`."""
    place = local_copy(location, options.get("revision"))
    if place != location:
        model, grids = read(place, {**options, "revision": None})
        model.config._commit_hash = Path(place).name
        return model, grids
    kind = check_readable(Path(place)) if Path(place).exists() else None
    with quiet():
        if kind is None:
            return read_plain(place, options), {}
        if kind == "gguf":
            return gguf_file.read(Path(place), options)
        if kind == "peft":
            return adapter.read(Path(place), options, read)
        return read_quantised(Path(place), kind, options)
