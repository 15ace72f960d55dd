"""Locks between processes that share a folder; a lock is released when its process ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 5.0
"""Seconds after which waiting is reported."""


@contextmanager
def locked(path: Path, waiting: Callable[[float], None]) -> Iterator[None]:
    """Hold the lock file at `path`, and wait for it if necessary.

    `waiting` is called once, with the seconds waited so far, if that takes long. Raises OSError if the file system
    is full or does not support locks.
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
