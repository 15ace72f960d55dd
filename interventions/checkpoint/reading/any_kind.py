"""Read a model of any kind. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interventions.checkpoint.reading import adapter, gguf_file
from interventions.checkpoint.reading.folder import check_folder
from interventions.checkpoint.reading.hub import local_copy
from interventions.checkpoint.reading.model import read_plain, read_quantised
from interventions.checkpoint.reading.quiet import quiet
from interventions.known_grids import KnownGrid


def read(location: str, options: dict[str, Any]) -> tuple[Any, dict[str, KnownGrid]]:
    """Return a model and its grids; see `interventions.checkpoint.reading.read_model`."""
    place = local_copy(location, options.get("revision"))
    if place != Path(location):
        model, grids = read(str(place), {**options, "revision": None})
        model.config._commit_hash = place.name
        model.name_or_path = model.config._name_or_path = location
        return model, grids
    kind = check_folder(place, tokenizer=False)
    with quiet():
        if kind is None:
            return read_plain(location, options), {}
        if kind == "gguf":
            return gguf_file.read(place, options)
        if kind == "peft":
            return adapter.read(place, options, read)
        return read_quantised(place, kind, options)
