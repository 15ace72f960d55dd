"""Read the rows of a data file: json, jsonl, csv, tsv, parquet or txt, each also gzipped. No torch."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from pytest_lmcompose.data.records import WorldError

Rows = Iterator[tuple[int, Any]]
"""Rows with their numbers from 1: objects, or a text as `{"text": ...}`."""
_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BATCH = 1024


def is_data_file(path: str) -> bool:
    """Say whether a path ends as a data file does."""
    return _suffix(path) in _READERS


def file_rows(path: Path) -> Rows:
    """Yield the rows of a file, read as its name ends; byte-order marks and CRLF are accepted.

    A line of a txt file is a text. A json file holds a list, or JSON lines. Raises WorldError.
    """
    read = _READERS.get(_suffix(str(path)))
    if read is None:
        raise WorldError(f"{path}: unknown kind of file; expected {', '.join(_READERS)}, or one of them with .gz")
    try:
        with path.open("rb") as stream:
            yield from read(path, _unzipped(stream))
    except FileNotFoundError:
        raise WorldError(f"no such data file: {path}") from None
    except (OSError, EOFError, UnicodeError) as error:
        raise WorldError(f"{path}: cannot be read: {error}") from None


def _suffix(path: str) -> str:
    return PurePath(path.lower().removesuffix(".gz")).suffix


def _unzipped(stream: IO[bytes]) -> IO[bytes]:
    zipped = stream.read(2) == _GZIP
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if zipped else stream  # type: ignore[return-value]


def _text(stream: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    head = stream.read(2)
    stream.seek(0)
    return io.TextIOWrapper(stream, "utf-16" if head in _UTF16 else "utf-8-sig", newline=newline)


def _json_lines(path: Path, stream: IO[bytes]) -> Rows:
    with _text(stream) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _as_row(_parsed(line, f"{path}, record {number}"))


def _json(path: Path, stream: IO[bytes]) -> Rows:
    with _text(stream) as text:
        head = list(itertools.islice(text, 2))
        if len(head) == 2 and all(line.startswith("{") and _is_json(line) for line in head):  # as C4 has them
            for number, line in enumerate(itertools.chain(head, text), start=1):
                if line.strip():
                    yield number, _parsed(line, f"{path}, record {number}")
            return
        whole = "".join([*head, *text])
    found = _parsed(whole, str(path), lines=True)
    if isinstance(found, dict):
        inside = list(found.values())
        found = inside[0] if len(inside) == 1 and isinstance(inside[0], list) else [found]  # {"data": [...]}
    if not isinstance(found, list) or not found:
        raise WorldError(f"{path}: expected a list with at least one record")
    yield from enumerate(map(_as_row, found), start=1)


def _parsed(text: str, where: str, *, lines: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if lines else ""
        raise WorldError(f"{where}{line}: not JSON: {error.msg}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _as_row(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


def _table(delimiter: str) -> Callable[[Path, IO[bytes]], Rows]:
    def read(path: Path, stream: IO[bytes]) -> Rows:
        csv.field_size_limit(sys.maxsize)
        with _text(stream, newline="") as lines:
            rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
            try:
                for number, row in enumerate(rows, start=1):
                    if None in row or None in row.values():
                        raise WorldError(f"{path}, record {number}: not as many cells as the header has names")
                    yield number, row
            except csv.Error as error:
                raise WorldError(f"{path}, line {rows.line_num}: not readable as a table: {error}") from None

    return read


def _parquet(path: Path, stream: IO[bytes]) -> Rows:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream)
        yield from enumerate((row for batch in batches.iter_batches(_BATCH) for row in batch.to_pylist()), start=1)
    except ArrowException as error:
        raise WorldError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def _lines(path: Path, stream: IO[bytes]) -> Rows:
    with _text(stream) as lines:
        for number, line in enumerate(lines, start=1):
            yield number, {"text": line.rstrip("\n")}


_READERS: dict[str, Callable[[Path, IO[bytes]], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _lines,
}
