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
    """Set the OpenMP variables that the user left open.

    Spinning threads make runs on a CPU vary 10 to 35 times, so waiting is passive. A worker of
    pytest-xdist takes its share of the cores: two workers of two threads each on two cores are
    slower than one.
    """
    environ.setdefault("OMP_WAIT_POLICY", "passive")
    workers = int(environ.get(WORKER_COUNT, "0"))
    if workers > 0:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))


def torch_threads(environ: MutableMapping[str, str]) -> int | None:
    """Return the thread count to set in torch, or None to leave torch's own choice.

    `OMP_NUM_THREADS` is read once, when OpenMP starts, which an earlier import may have done.
    """
    value = environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None
