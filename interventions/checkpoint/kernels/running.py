"""Run a command of the user's on a saved model. Imports no torch."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from interventions.types import InterventionError

_LINES = 12
_TAIL = 2**14
"""Bytes at the end of a log."""


def run_command(command: str, places: Mapping[str, Path], seed: int, cwd: Path, log: Path, timeout: float) -> None:
    """Run `command` in a shell in `cwd`, with `{name}` replaced by the path of each of `places`.

    The environment has the same paths as LMCOMPOSE_NAME, and the seed as LMCOMPOSE_SEED. The output goes to `log`. The
    command and all that it started end after `timeout` seconds, and with this process's step. Raises InterventionError
    with the last lines of the output.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["LMCOMPOSE_SEED"] = str(seed)
    for name, path in places.items():
        command = command.replace(f"{{{name}}}", shlex.quote(str(path)))
        environment[f"LMCOMPOSE_{name.upper()}"] = str(path)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            shell=True,  # as typed, with pipes and variables; the user permits commands by a flag
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise InterventionError(
                f"command: stopped after timeout={timeout:g} seconds; its last output:\n{_tail(log)}"
            ) from None
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        raise InterventionError(f"command: failed ({how}); its last output:\n{_tail(log)}")


def named_files(command: str, folder: Path) -> Iterator[Path]:
    """Yield the files that the words of a command name, also after `=`, such as its script and its config."""
    try:
        words = shlex.shlex(command, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        found = list(words)
    except ValueError:  # the shell will say so
        found = command.split()
    for word in found:
        for part in dict.fromkeys((word, word.rpartition("=")[2])):
            path = folder / os.path.expanduser(part)
            if part and path.is_file():
                yield path


def check_space(folder: Path, needed: int) -> None:
    """Raise InterventionError if the disk of `folder` has fewer than `needed` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InterventionError(
            f"command: {folder} has {free / 2**30:.1f} GiB of free space, but two copies of the model need "
            f"{needed / 2**30:.1f}: set command.scratch to a folder on another disk"
        )


def _tail(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL))
        text = stream.read().decode(errors="replace")
    return "\n".join(text.strip().splitlines()[-_LINES:]) or "(none)"
