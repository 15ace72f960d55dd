"""Defaults for torch's threads, set in the environment before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WORKER_COUNT = "PYTEST_XDIST_WORKER_COUNT"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def set_defaults(environ: MutableMapping[str, str], cores: int) -> None:
    """Set the OpenMP variables that are not set yet.

    Threads wait passively, because spinning makes CPU times vary 10 to 35 times. Workers of pytest-xdist divide the
    cores: two workers with two threads each on two cores are slower than one worker.
    """
    environ.setdefault("OMP_WAIT_POLICY", "passive")
    workers = int(environ.get(WORKER_COUNT, "0"))
    if workers > 0:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))


def torch_threads(environ: MutableMapping[str, str]) -> int | None:
    """Return the thread count to set in torch; None keeps torch's default.

    OpenMP reads `OMP_NUM_THREADS` only once, and an earlier import may have started it.
    """
    value = environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None
