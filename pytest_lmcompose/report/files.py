"""Files that are replaced at once, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` at once: a reader finds the old file or the whole new one. A link stays a link."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def append_text(path: Path, text: str) -> None:
    """Add `text` to what `path` holds, at once; what others wrote there stays."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before:
        before = before.rstrip("\n") + "\n\n"
    write_text(path, before + text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
