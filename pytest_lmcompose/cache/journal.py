"""Notes of what a run has finished, beside the store: a run that was killed left one. No torch."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Interrupted:
    """A run that began and did not end."""

    began: float
    """Seconds since 1970."""
    finished: frozenset[str]
    """Ids of the compositions that it had measured."""


class Journal:
    """One run's notes, a line each, so that nothing that was noted is lost with the process.

    Written by one process of a run. What cannot be written is left: notes are for the user alone.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Keep notes in `folder`; `run` is the address of all that was asked of this run."""
        self._path = folder / "runs" / f"{run}.jsonl"
        self._begun = False

    def interrupted(self) -> Interrupted | None:
        """Return what a run with the same options has left, or None."""
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
        """Note that `composition` was measured."""
        note = json.dumps({"id": composition}) + "\n"
        with suppress(OSError):
            if not self._begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(json.dumps({"began": time.time()}) + "\n", encoding="utf-8")
                self._begun = True
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(note)

    def ended(self) -> None:
        """Throw the notes away: the run came to its end."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
