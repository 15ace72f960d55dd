"""Stored runs: numbered reports in a folder, 0001_NAME.json, 0002_NAME.json, ... Imports no torch.

A finished file is renamed into place and never changes: the folder is the history of a release.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from interventions.names import near_names
from pytest_lmcompose.baseline.options import FOLDER as FOLDER
from pytest_lmcompose.baseline.options import NAME as NAME
from pytest_lmcompose.cache.locks import locked
from pytest_lmcompose.report.files import is_file, write_text
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.results import LaterReportError, Report, ReportError, decode

_FILE = re.compile(rf"(\d{{4,}})_({NAME.pattern})\.json")


class StorageError(ValueError):
    """A stored run is missing or unusable; the message names the file and the fix."""


@dataclass(frozen=True)
class Stored:
    """The file of a stored run."""

    path: Path
    number: int
    name: str

    def __str__(self) -> str:
        return self.path.stem


class Storage:
    """The stored runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def runs(self) -> list[Stored]:
        """Return the files of the stored runs, ordered by number."""
        found = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in self.folder.iterdir():
                if match := _FILE.fullmatch(path.name):
                    found.append(Stored(path, int(match[1]), match[2]))
        return sorted(found, key=lambda run: (run.number, run.name))

    def find(self, key: str, base: Path | None = None) -> Path:
        """Return the file of a run, by number, name (the latest wins), file name, or path.

        Paths are relative to `base`, by default the working directory. Raises StorageError.
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
        """Return the latest passed run, None if there is none, and the failed runs after it.

        A failed run as a baseline would let the next one fail too. Raises StorageError if a later file cannot be read.
        """
        failed: list[Stored] = []
        for run in reversed(self.runs()):
            if passed(read_run(run.path)):
                return run.path, failed
            failed.append(run)
        return None, failed

    def save(self, report: Report, name: str) -> Path:
        """Store a run under the next free number, also beside other processes; return its file. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", lambda seconds: None):
            number = max((run.number for run in self.runs()), default=0) + 1
            path = self.folder / f"{number:04d}_{name}.json"
            write_text(path, msgspec.json.encode(compact(msgspec.to_builtins(report))).decode() + "\n")
        return path


def read_run(path: Path) -> Report:
    """Read a report; raises StorageError if it is broken or of an unknown version."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StorageError(f"{path} cannot be read: it is not a file")
        return decode(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    except LaterReportError as error:
        raise StorageError(f"{path} {error}; install the pytest-lmcompose that wrote it, or a later one") from None
    except ReportError as error:
        raise StorageError(f"{path} {visible(str(error)):.300}; store it again, or compare with another run") from None


def passed(report: Report) -> bool:
    """Return whether a run finished without a failure."""
    if report.stored is not None:
        return report.stored.passed
    return report.status == "finished" and all(
        record.status == "measured" and not record.failed_metrics for record in report.compositions
    )


def compact(value: Any) -> Any:
    """Return plain data with whole floats as ints, to save space: most samples are 0.0 or 1.0."""
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [compact(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
