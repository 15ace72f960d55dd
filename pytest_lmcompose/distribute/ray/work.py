"""One part of a run on a node of the cluster: in a process of its own, whose death loses one test. No Ray.

Tests are run by pytest with the arguments of the run. States come from parts before as parcels and go to
parts behind as such, so that nodes need no store in common.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PART = "LMCOMPOSE_PART"
"""Environment variable with the path of what `inside` reads."""
_TAIL = 4000
"""Characters of output that are shown of a process that died."""

Parcels = dict[str, bytes]
"""Entries of the store, by address."""


@dataclass(frozen=True)
class Job:
    """What all parts of a run have in common."""

    arguments: tuple[str, ...]
    """Of pytest."""
    folder: str
    """Where pytest was called; it must be there on every node."""
    environment: Mapping[str, str]
    """Variables that decide about the run, and may not be set on a node."""
    inputs: Mapping[str, Any]
    """What else the controller tells its workers."""


@dataclass
class Outcome:
    """What came of a part."""

    node: str
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Of its tests, as pytest serialises them."""
    crashed: dict[str, str] = field(default_factory=dict)
    """Ids of tests that took the process with them, and how it ended."""
    unreported: list[str] = field(default_factory=list)
    """Ids of tests that were not run."""
    lines: list[str] = field(default_factory=list)
    """What was told while it went."""
    output: str = ""
    """The end of what the last process wrote."""


def run_part(
    job: Job, name: str, tests: Sequence[str], leaves: str | None, *before: Parcels
) -> tuple[Outcome, Parcels]:
    """Run `tests`, given by their ids, and build the state `leaves`; `before` are states that others built.

    A test that kills its process is reported as crashed and not repeated; the next ones run in another.
    """
    outcome = Outcome(platform.node())
    with tempfile.TemporaryDirectory(prefix="lmcompose-") as scratch:
        folder = Path(scratch)
        for place in ("in", "out"):
            (folder / place).mkdir()
        for address, parcel in (pair for parcels in before for pair in parcels.items()):
            (folder / "in" / address).write_bytes(parcel)
        waiting = list(tests)
        while True:
            ended = _process(job, name, waiting, leaves, folder, outcome)
            started, finished = _events(folder / "events", outcome)
            waiting = [test for test in waiting if test not in finished and test != started]
            if started is None:
                break
            outcome.crashed[started] = f"{ended} while it ran this test\n{outcome.output}"
        outcome.unreported = waiting
        return outcome, {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def _process(job: Job, name: str, tests: Sequence[str], leaves: str | None, folder: Path, outcome: Outcome) -> str:
    """Run pytest on `tests` and return how it ended."""
    alive, watched = os.pipe()  # which closes with this process, however it ends
    part = folder / "part.json"
    described = {"tests": tests, "leaves": leaves, "folder": str(folder), "alive": alive}
    part.write_text(json.dumps({**described, "inputs": {**job.inputs, "workerid": name}}), encoding="utf-8")
    # As in a worker of pytest-xdist: by that variable plugins know that there is no terminal.
    environment = {**os.environ, **job.environment, PART: str(part), "PYTEST_XDIST_WORKER": name}
    command = [sys.executable, "-m", "pytest", "-p", "pytest_lmcompose.distribute.ray.inside", *job.arguments]
    (folder / "events").write_text("")
    try:
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.run(
                [*command, "--lmcompose-engine=local"],
                cwd=job.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[alive],
                check=False,
            )
    finally:
        os.close(alive)
        os.close(watched)
    told = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    outcome.lines += [line for line in told.splitlines() if line.startswith(f"[{name}]")]
    written = (folder / "stdout").read_text(encoding="utf-8", errors="replace")
    outcome.output = "\n".join(filter(None, (written[-_TAIL:].strip(), told[-_TAIL:].strip())))
    code = process.returncode
    return f"the process was killed by signal {-code}" if code < 0 else f"the process ended with exit code {code}"


def _events(path: Path, outcome: Outcome) -> tuple[str | None, set[str]]:
    """Take over the reports that a process wrote; return the test that it died in, and those that it finished."""
    started, finished = None, set()
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # the last one may be cut off
        kind, value = json.loads(line)
        if kind == "start":
            started = value
        elif kind == "report":
            outcome.reports.append(value)
        else:
            finished.add(value)
            started = None
    return started, finished
