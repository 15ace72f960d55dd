"""Stored runs: numbered report documents in a folder, 0001_NAME.json, 0002_NAME.json, ... Imports no torch.

A file appears whole, by a rename, and is never written again: the folder is the history of a release.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interventions.names import near_names
from pytest_lmcompose.baseline.keeping import FOLDER as FOLDER
from pytest_lmcompose.baseline.keeping import NAME as NAME
from pytest_lmcompose.report.files import is_file, write_text
from pytest_lmcompose.report.json import SCHEMA_VERSION
from pytest_lmcompose.report.valid import problem_of
from pytest_lmcompose.store.locks import locked

_FILE = re.compile(rf"(\d{{4,}})_({NAME.pattern})\.json")


class StorageError(ValueError):
    """A stored run that is not there or cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Stored:
    """A file of a stored run."""

    path: Path
    number: int
    name: str

    def __str__(self) -> str:
        return self.path.stem


class Storage:
    """The stored runs of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def runs(self) -> list[Stored]:
        """Return the files of the stored runs by number."""
        found = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in self.folder.iterdir():
                if match := _FILE.fullmatch(path.name):
                    found.append(Stored(path, int(match[1]), match[2]))
        return sorted(found, key=lambda run: (run.number, run.name))

    def find(self, key: str, base: Path | None = None) -> Path:
        """Return the file of a run, given by its number, its name (the latest of it), its file's name, or a path.

        Relative paths count from `base`, the working folder if it is None. Raises StorageError.
        """
        runs = self.runs()
        if re.fullmatch(r"\d+", key) and (found := [run for run in runs if run.number == int(key)]):
            return found[-1].path
        if found := [run for run in runs if key in (run.name, str(run), run.path.name)]:
            return found[-1].path
        path = (base or Path()) / os.path.expanduser(key)
        if is_file(path):
            return path
        names = dict.fromkeys(run.name for run in runs)
        near = near_names(key, names)
        known = f"Stored are: {', '.join(map(str, runs[-10:]))}." if runs else "Nothing is stored there yet."
        raise StorageError(f"no stored run {key!r} in {self.folder}, and no such file.{near} {known}")

    def latest(self) -> tuple[Path | None, list[Stored]]:
        """Return the latest run that passed, None if there is none, and later ones that did not pass.

        A run that failed is no promise: it would let the next one fail as well. Raises StorageError for
        a later file that cannot be read.
        """
        failed: list[Stored] = []
        for run in reversed(self.runs()):
            if passed(read_run(run.path)):
                return run.path, failed
            failed.append(run)
        return None, failed

    def save(self, document: Mapping[str, Any], name: str) -> Path:
        """Store a run under the next number; return its file. Raises OSError.

        Two processes that store at once get numbers of their own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(compact(document), separators=(",", ":"), allow_nan=False) + "\n"
        with locked(self.folder / ".lock", lambda seconds: None):
            number = max((run.number for run in self.runs()), default=0) + 1
            path = self.folder / f"{number:04d}_{name}.json"
            write_text(path, text)
        return path


def read_run(path: Path) -> dict[str, Any]:
    """Read a report; raises StorageError for one that is broken, or of a format that is not known here."""
    again = "store it again, or compare with another run"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StorageError(f"{path} cannot be read: it is no file")
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StorageError(f"{path} is broken or cut off: it is no text in UTF-8; {again}") from None
    except RecursionError:
        raise StorageError(f"{path} is broken or cut off: lists in lists without end; {again}") from None
    except ValueError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} is broken or cut off: {error}; {again}") from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise StorageError(f"{path} is no report of pytest-lmcompose: it has no schema_version; {again}")
    version = document["schema_version"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        todo = "install the pytest-lmcompose that wrote it, or a later one" if newer else again
        shown = f"{version!a:.40}"
        raise StorageError(f"{path} has the report schema {shown}, and this version reads {SCHEMA_VERSION}; {todo}")
    if (damage := problem_of(document)) is not None:
        raise StorageError(f"{path} is damaged: {damage}; {again}")
    return document


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def passed(document: Mapping[str, Any]) -> bool:
    """Say whether a run came to its end without a failure."""
    stored = document.get("stored")
    if stored is not None:
        return bool(stored["passed"])
    records = document["compositions"]
    gates = [gate for record in records for gate in record["gates"]]
    return document["status"] == "finished" and all(
        (*(gate["passed"] for gate in gates), *(record["status"] == "measured" for record in records))
    )


def compact(value: Any) -> Any:
    """Return plain data with whole numbers written as such: most samples are 0.0 or 1.0."""
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [compact(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
