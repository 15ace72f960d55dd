"""Read a PEFT adapter with its base model, merged. Imports torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.kinds import ADAPTER, BASE, ReadingError, adapter_base, read_object
from interventions.checkpoint.reading.model import digest_of
from interventions.checkpoint.reading.model import read as read_any
from interventions.known_grids import KnownGrid


def read(folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, KnownGrid]]:
    """Return the base model with the adapter merged in, and the grids of the weights that it leaves as they were."""
    base = adapter_base(folder)
    config = read_object(folder / ADAPTER)
    try:
        model, grids = read_any(base, {**options, "revision": config.get("revision")})
    except OSError as error:
        if Path(base).exists():
            raise
        raise ReadingError(
            f"{folder / ADAPTER}: its base model {base!r} is not a folder, and the hub or its cache does not have it "
            f"({' '.join(str(error).split())[:150]}): set {BASE} to its folder, or HF_HOME to a cache that has it"
        ) from error
    merged = merge(model, folder)
    return merged, {
        name: grid
        for name, grid in grids.items()
        if digest_of(merged.get_submodule(name.removesuffix(".weight"))) == grid.digest
    }


def merge(model: Any, folder: Path) -> Any:
    """Return `model` with the adapter in `folder` merged into its weights; raises ReadingError if it does not fit."""
    from peft import PeftModel

    name_or_path = model.name_or_path
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
        missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message).lower()]
        if missing:
            raise ReadingError(
                f"the adapter {folder} lacks weights that its adapter_config.json describes: "
                f"{' '.join(missing[0].split())[:200]}"
            )
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.peft_config["default"].peft_type
            raise ReadingError(f"the adapter {folder} ({getattr(kind, 'value', kind)}) cannot be merged into weights")
        merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ReadingError(f"the adapter {folder} does not fit its base model {name_or_path}: {reason}") from error
    for part in ("peft_config", "_hf_peft_config_loaded"):
        vars(merged).pop(part, None)
    return merged
