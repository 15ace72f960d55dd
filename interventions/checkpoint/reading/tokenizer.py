"""Read the tokenizer of a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interventions.checkpoint.reading.hub import SETTINGS, local_copy
from interventions.checkpoint.reading.kinds import ReadingError, tokenizer_source
from interventions.checkpoint.reading.quiet import quiet


def read(location: str, options: dict[str, Any]) -> Any:
    """Return a tokenizer; see `interventions.checkpoint.reading.read_tokenizer`."""
    from transformers import AutoTokenizer

    copy = local_copy(location, options.get("revision"), SETTINGS)
    place, gguf = tokenizer_source(str(copy))
    if gguf is not None:
        from interventions.checkpoint.reading.gguf_file import read_tokenizer

        return read_tokenizer(Path(place) / gguf)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(local_copy(place, None, SETTINGS), **{**options, "revision": None})
    except (AttributeError, LookupError, TypeError) as error:  # they do not say what is wrong
        raise ReadingError(
            f"the tokenizer in {place} is damaged ({type(error).__name__}: {error}): save the model's own there with "
            "tokenizer.save_pretrained"
        ) from error
