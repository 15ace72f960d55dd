"""Pack an entry of the cache into one file. Imports no torch."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path


def pack(folder: Path, file: Path) -> None:
    """Write the files in `folder` into one file; raises OSError."""
    with tarfile.open(file, "w") as parcel:
        for path in sorted(folder.iterdir()):
            parcel.add(path, path.name)


def unpack(file: Path, folder: Path) -> None:
    """Write the packed files into `folder`, and never outside of it.

    Raises ValueError for an incomplete or invalid file, OSError if reading or writing fails.
    """
    try:
        with tarfile.open(file, "r:") as parcel:
            for member in parcel:
                source = parcel.extractfile(member)
                if source is None or Path(member.name).name != member.name:
                    raise ValueError(f"holds {member.name!r}, which is not a file of an entry")
                with source, (folder / member.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except tarfile.TarError as error:
        raise ValueError(str(error)) from None
