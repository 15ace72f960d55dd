"""Run one part on a node, in a separate process so that a crash loses only one test. Imports no Ray.

The process runs pytest with the arguments of the run. Parts exchange states as parcels, so nodes need no shared cache.
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
"""Environment variable with the path of the file that describes the part to `inside`."""
_TAIL = 4000
"""Number of characters to show of the output of a process that died."""

Parcels = dict[str, bytes]
"""Packed cache entries, by address."""


@dataclass(frozen=True)
class Job:
    """The arguments that all parts of a run share."""

    arguments: tuple[str, ...]
    """Arguments of pytest."""
    folder: str
    """Folder where pytest was called; it must exist on every node."""
    environment: Mapping[str, str]
    """Variables that affect the run and may not be set on a node."""
    inputs: Mapping[str, Any]
    """Additional `workerinput` from the controller."""


@dataclass
class Outcome:
    """The outcome of a part."""

    node: str
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Test reports, as serialised by pytest."""
    crashed: dict[str, str] = field(default_factory=dict)
    """How the process ended, by the id of the test that crashed it."""
    unreported: list[str] = field(default_factory=list)
    """Ids of tests that did not run."""
    lines: list[str] = field(default_factory=list)
    """Progress lines."""
    output: str = ""
    """The end of the last process's output."""


def run_part(
    job: Job, name: str, tests: Sequence[str], leaves: str | None, *before: Parcels
) -> tuple[Outcome, Parcels]:
    """Run the tests with these ids and build the state `leaves`; `before` has the states of earlier parts.

    If a test kills the process, record it as crashed and run the remaining tests in a new process.
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
    alive, watched = os.pipe()  # the pipe closes when this process ends for any reason
    part = folder / "part.json"
    described = {"tests": tests, "leaves": leaves, "folder": str(folder), "alive": alive}
    part.write_text(json.dumps({**described, "inputs": {**job.inputs, "workerid": name}}), encoding="utf-8")
    # As in a worker of pytest-xdist: the variable says that there is no terminal.
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
    written, errors = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    outcome.lines += [line for line in errors.splitlines() if line.startswith(f"[{name}]")]
    outcome.output = "\n".join(filter(None, (written[-_TAIL:].strip(), errors[-_TAIL:].strip())))
    code = process.returncode
    return f"the process was killed by signal {-code}" if code < 0 else f"the process ended with exit code {code}"


def _events(path: Path, outcome: Outcome) -> tuple[str | None, set[str]]:
    """Append the process's reports to `outcome`; return the test that it died in, and the tests that it finished."""
    started, finished = None, set()
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # the last line may be incomplete
        kind, value = json.loads(line)
        if kind == "start":
            started = value
        elif kind == "report":
            outcome.reports.append(value)
        else:
            finished.add(value)
            started = None
    return started, finished
