"""Read a PEFT adapter with its base model, merged. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from interventions.checkpoint.kernels.merging import merge_adapter
from interventions.checkpoint.reading.hub import AbsentError
from interventions.checkpoint.reading.kinds import ADAPTER, BASE, ReadingError, adapter_base, read_object
from interventions.checkpoint.reading.model import digest_of
from interventions.known_grids import KnownGrid
from interventions.types import InterventionError

Read = Callable[[str, dict[str, Any]], tuple[Any, dict[str, KnownGrid]]]


def read(folder: Path, options: dict[str, Any], read_base: Read) -> tuple[Any, dict[str, KnownGrid]]:
    """Return the base model with the adapter merged in, and the grids of the weights that it leaves as they were.

    Raises ReadingError for a missing base, and for an adapter that does not fit it or cannot be merged.
    """
    base = adapter_base(folder)
    config = read_object(folder / ADAPTER)
    try:
        model, grids = read_base(base, {**options, "revision": config.get("revision")})
    except AbsentError as error:
        raise ReadingError(f"{folder / ADAPTER}: its base model {error}, or {BASE} to the model's folder") from error
    try:
        merge_adapter(model, folder, 1.0, f"the adapter {folder} of {base}")
    except InterventionError as error:
        raise ReadingError(str(error)) from error
    return model, {
        name: grid
        for name, grid in grids.items()
        if digest_of(model.get_submodule(name.removesuffix(".weight"))) == grid.digest
    }
