"""Check a model's folder before loading it. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from interventions.checkpoint.reading import ReadingError
from interventions.checkpoint.reading import check_folder as check
from pytest_lmcompose.errors import ModelError


def check_folder(folder: Path, *, tokenizer: bool = True) -> None:
    """Raise ModelError for the first problem that prevents loading a model; see `reading.check_folder`."""
    try:
        check(folder, tokenizer=tokenizer)
    except ReadingError as error:
        raise ModelError(str(error)) from None
