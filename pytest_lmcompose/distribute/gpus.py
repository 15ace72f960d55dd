"""Which GPUs a run may use, by name, and which of them a worker gets. Starts neither CUDA nor torch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")
_PATIENCE = 30.0
"""Seconds for a driver that has to wake up first."""


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the GPUs that this process may use, each as `CUDA_VISIBLE_DEVICES` names it.

    What that variable says is taken as it is: indices, UUIDs and MIG ids, up to the first that is none of
    these, as CUDA does. Without it, these are all that `nvidia-smi -L` lists; none if it is missing or fails.
    """
    if VISIBLE in environ:
        return _leading_names(environ[VISIBLE])
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_PATIENCE, check=True, env=dict(environ)
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return _listed(listed.stdout)


def share_of(gpus: Sequence[str], worker: int, each: int) -> tuple[str, ...]:
    """Return the `each` GPUs of the worker number `worker`; more workers than GPUs go round."""
    shares = len(gpus) // each
    start = worker % shares * each
    return tuple(gpus[start : start + each])


def _leading_names(value: str) -> tuple[str, ...]:
    names = []
    for name in map(str.strip, value.split(",")):
        if not _NAME.fullmatch(name):
            break
        names.append(name)
    return tuple(names)


def _listed(text: str) -> tuple[str, ...]:
    """Read the list of nvidia-smi: an index for a whole GPU, the UUIDs of its parts for one that is divided."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            found.append((gpu[1], []))
        elif found and (part := re.match(r"\s+MIG .*\(UUID: (MIG-\S+)\)", line)):
            found[-1][1].append(part[1])
    return tuple(name for index, parts in found for name in (parts or [index]))
