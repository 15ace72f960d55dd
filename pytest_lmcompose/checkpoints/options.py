"""The flags that export compositions, and the names of their folders. Imports no torch."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pytest_lmcompose.checkpoints.folder import check_target, is_own
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.errors import CheckpointError

PLAIN = "plain"
"""The format of a folder in full precision."""
FORMATS = (PLAIN, "compressed-tensors", "gptq", "awq")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")
_LONGEST = 80


@dataclass(frozen=True)
class ExportOptions:
    """Where to export compositions, and how."""

    folder: Path
    format: str = PLAIN
    single: bool = False
    """Whether `folder` is for the only composition, instead of one folder in it for each."""

    def target(self, composition: Composition) -> Path:
        """Return the folder of `composition`."""
        return self.folder if self.single else self.folder / folder_name(composition.id)

    def check(self, model: Path) -> None:
        """Check that the export can be written and does not touch the folder `model`; raises CheckpointError."""
        check_target(self.folder if self.single else self.folder / "composition")
        folder = self.folder.resolve()
        if not self.single and is_own(folder):
            raise CheckpointError(f"{folder} is itself an exported model; choose the folder above it, or another one")
        model = model.resolve()
        if model.exists() and (folder.is_relative_to(model) or (self.single and model.is_relative_to(folder))):
            raise CheckpointError(f"{folder} is the folder of the model; choose another one")


def folder_name(composition: str) -> str:
    """Return a file name that is distinct for each composition and needs no quotes.

    For example `memit+awq`, and `awq-bits=3+memit-1a2b3c4d` for `awq[bits=3]+memit`.
    """
    name = _UNSAFE.sub("-", composition.replace("]", ""))[:_LONGEST].rstrip("-.")
    if name == composition:
        return name
    return f"{name}-{hashlib.sha256(composition.encode()).hexdigest()[:8]}"
