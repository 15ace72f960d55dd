"""Locks between processes that share a folder. A lock dies with the process that holds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 5.0
"""Seconds of waiting after which the waiting is told."""


@contextmanager
def locked(path: Path, waiting: Callable[[float], None]) -> Iterator[None]:
    """Hold the lock file at `path`, waiting for it as long as it takes.

    `waiting` is called once, with the seconds waited so far, if another process keeps the lock for long.
    A file system that knows no locks, or is full, raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    start = time.monotonic()
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=0.05)
    except Timeout:
        waiting(time.monotonic() - start)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()
