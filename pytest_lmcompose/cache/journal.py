"""The journal of a run: which compositions are finished, to resume it if it is killed. Imports no torch."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Interrupted:
    """A run that started and did not end."""

    began: float
    """Seconds since 1970."""
    finished: frozenset[str]
    """Ids of the compositions that it measured."""


class Journal:
    """The journal of one run, written line by line by one of its processes.

    Errors while writing are ignored: the journal is only for the user.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Write to `folder`; `run` is the address of everything that the run was asked to do."""
        self._path = folder / "runs" / f"{run}.jsonl"
        self._begun = False

    def interrupted(self) -> Interrupted | None:
        """Return what an interrupted run with the same options left, or None."""
        with suppress(OSError):
            lines = self._path.read_text(encoding="utf-8").split("\n")
            notes = []
            for line in lines[:-1]:  # the last one may be cut off
                with suppress(ValueError):
                    notes.append(json.loads(line))
            if notes and "began" in notes[0]:
                return Interrupted(notes[0]["began"], frozenset(note["id"] for note in notes if "id" in note))
        return None

    def finished(self, composition: str) -> None:
        """Record that `composition` was measured."""
        note = json.dumps({"id": composition}) + "\n"
        with suppress(OSError):
            if not self._begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(json.dumps({"began": time.time()}) + "\n", encoding="utf-8")
                self._begun = True
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(note)

    def ended(self) -> None:
        """Delete the journal: the run is finished."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
