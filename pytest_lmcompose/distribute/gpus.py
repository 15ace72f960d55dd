"""Find the GPUs that a run may use, and assign them to workers. Starts neither CUDA nor torch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")
_DEVICES = ("nvidia[0-9]*", "nvhost-gpu", "kfd", "dxg")
"""Names under /dev of what may be a GPU: NVIDIA's, AMD's and those of Windows."""
_TIMEOUT = 30.0
"""In seconds; an idle driver needs time to start."""


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use, as in `CUDA_VISIBLE_DEVICES`.

    Like CUDA, read that variable up to the first entry that is not an index, a UUID or a MIG id. If it is not set,
    return all GPUs that `nvidia-smi -L` lists; none if the command is missing or fails.
    """
    if VISIBLE in environ:
        return tuple(takewhile(_NAME.fullmatch, map(str.strip, environ[VISIBLE].split(","))))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_TIMEOUT, check=True, env=dict(environ)
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return _listed(listed.stdout)


def may_have_gpu(environ: Mapping[str, str]) -> bool:
    """Return whether torch may find a GPU for this process; looks at the environment and at device files only."""
    if VISIBLE in environ:
        return bool(visible_gpus(environ))
    return any(any(Path("/dev").glob(name)) for name in _DEVICES)


def share_of(gpus: Sequence[str], worker: int, each: int) -> tuple[str, ...]:
    """Return the `each` GPUs of worker number `worker`; workers share GPUs if there are too few."""
    start = worker % (len(gpus) // each) * each
    return tuple(gpus[start : start + each])


def _listed(text: str) -> tuple[str, ...]:
    """Parse the output of `nvidia-smi -L` into the index of each GPU, or the UUIDs of its MIG devices."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            found.append((gpu[1], []))
        elif found and (part := re.match(r"\s+MIG .*\(UUID: (MIG-\S+)\)", line)):
            found[-1][1].append(part[1])
    return tuple(name for index, parts in found for name in (parts or [index]))
