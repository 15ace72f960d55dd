"""Read the tokenizer of a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.hub import SETTINGS, local_copy
from interventions.checkpoint.reading.kinds import tokenizer_source
from interventions.checkpoint.reading.quiet import quiet


def read(location: str, options: dict[str, Any]) -> Any:
    """Return a tokenizer; see `interventions.checkpoint.reading.read_tokenizer`."""
    from transformers import AutoTokenizer

    copy = local_copy(location, options.get("revision"), SETTINGS)
    place, gguf = tokenizer_source(str(copy))
    if gguf is not None:
        from interventions.checkpoint.reading.gguf_file import read_tokenizer

        return read_tokenizer(Path(place) / gguf)
    with quiet():
        return AutoTokenizer.from_pretrained(local_copy(place, None, SETTINGS), **{**options, "revision": None})
