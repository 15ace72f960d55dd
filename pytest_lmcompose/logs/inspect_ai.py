"""Read logs of Inspect (inspect_ai): `.eval` archives and JSON."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec

from pytest_lmcompose.logs.log import Log, LogError, Metric, decode, gather

_ZSTANDARD = 93
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    msgspec.MsgspecError,
)
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Lengths of the name and of the extra field, at the end of the header before a member of an archive."""


class _Score(msgspec.Struct):
    value: Any = None


class _Message(msgspec.Struct):
    content: Any = None
    role: str = ""


class _Sample(msgspec.Struct):
    id: str | int
    input: str | list[_Message] = ""
    scores: dict[str, _Score] | None = None
    error: Any = None

    @property
    def prompt(self) -> str:
        """The input without the ids of its messages, which are new in every run."""
        return self.input if isinstance(self.input, str) else repr(self.input)


class _Task(msgspec.Struct):
    task: str
    model: str = ""


class _Header(msgspec.Struct):
    eval: _Task
    status: str = ""
    samples: list[_Sample] | None = None


def read(file: Path) -> Log:
    """Return the scores in a log; raises LogError for one that is broken, unfinished, or has no samples."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if "header.json" not in names or "summaries.json" not in names:
                    raise LogError(f"{file}: no finished log of Inspect: header.json or summaries.json is missing")
                header = decode(_member(archive, file, "header.json"), _Header)
                samples = decode(_member(archive, file, "summaries.json"), list[_Sample])
        else:
            text = file.read_bytes()
            if text.startswith(b"PK"):
                raise LogError(f"{file} is a truncated archive; copy it again")
            header = decode(text, _Header)
            samples = header.samples or []
    except _BROKEN as error:
        raise LogError(f"{file} cannot be read as a log of Inspect: {error}") from None
    if header.status not in ("", "success"):
        raise LogError(f"{file}: the evaluation did not finish: its status is {header.status}")
    columns: dict[str, tuple[list[str], list[str], list[Any]]] = {}
    for sample in samples:
        if sample.error is not None:
            raise LogError(f"{file}: sample {sample.id} ended in an error and has no scores")
        for scorer, score in (sample.scores or {}).items():
            parts = score.value if isinstance(score.value, dict) else {None: score.value}
            for part, value in parts.items():
                name = f"{header.eval.task}/{scorer}" + ("" if part is None else f"/{part}")
                row = str(sample.id), sample.prompt, None if value != value else value  # NaN: not scored
                for column, item in zip(columns.setdefault(name, ([], [], [])), row, strict=True):
                    column.append(item)
    found: dict[str, Metric] = {}
    for name, (ids, prompts, values) in columns.items():
        gather(found, Metric(name), ids, prompts, values)
    return Log(str(file), "Inspect", found, header.eval.model)


def _member(archive: zipfile.ZipFile, file: Path, name: str) -> bytes:
    """Return a member of an archive, also one that is compressed by Zstandard, which `zipfile` does not know."""
    info = archive.getinfo(name)
    if info.compress_type != _ZSTANDARD:
        return archive.read(name)
    import pyarrow

    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        skipped = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        stream.seek(sum(skipped), 1)
        packed = stream.read(info.compress_size)
    unpacked: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd").read()
    return unpacked
