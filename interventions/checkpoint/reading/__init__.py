"""Read checkpoints of all kinds as full-precision weights.

A folder can hold plain safetensors, a quantised model, a GGUF file, or a PEFT adapter whose base is anywhere. All
become ordinary models with linear layers in one dtype; `read_model` also returns how each weight was stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interventions.checkpoint.reading.folder import check_folder as check_folder
from interventions.checkpoint.reading.kinds import ReadingError as ReadingError
from interventions.checkpoint.reading.kinds import check_readable as check_readable
from interventions.checkpoint.reading.kinds import read_kind as read_kind
from interventions.checkpoint.reading.kinds import sources as sources

if TYPE_CHECKING:
    from interventions.known_grids import KnownGrid


def read_model(location: str | Path, options: Mapping[str, Any]) -> tuple[Any, dict[str, KnownGrid]]:
    """Return the causal language model at a folder, GGUF file or hub id, and the grids of its weights by name.

    `options` are those of `from_pretrained`: dtype (a torch dtype, or "auto" for the stored one), revision,
    trust_remote_code, device_map. Raises ReadingError for a checkpoint that is incomplete or cannot be read; errors of
    transformers pass.
    """
    from interventions.checkpoint.reading.any_kind import read

    return read(str(location), dict(options))


def read_tokenizer(location: str | Path, options: Mapping[str, Any]) -> Any:
    """Return the tokenizer of the model at `location`; errors of transformers pass."""
    from interventions.checkpoint.reading.tokenizer import read

    return read(str(location), dict(options))
