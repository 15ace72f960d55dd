"""Write a folder under a temporary name beside its target and rename it when it is whole. Imports no torch.

The temporary folder is locked while its process lives, so the next run can tell what a killed one left behind and
remove it. A folder is replaced only if it contains the card that this package writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_lmcompose.errors import CheckpointError

CARD = "lmcompose.json"
"""The file that marks a folder as written by this package."""
_MARK = b'"card_version"'
"""Each card contains it."""
_PREFIX = ".{}.lmcompose-"
_OLD = "old"
"""The name, inside a temporary folder, of the folder that a new one replaces."""
_NEW = "new"
_FOLDER_MODE = 0o777
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` at the end, or is removed after an error.

    Missing folders above the target are created. Raises CheckpointError if the target cannot be written or is not one
    of ours.
    """
    target = _checked(target)
    created = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            scratch, lock = _scratch(target)
        try:
            making = scratch / _NEW
            with _explained(target):
                making.mkdir(_FOLDER_MODE)
                yield making
                for path in (*making.rglob("*"), making):
                    _flush(path)
                _checked(target)  # it may have changed meanwhile
                _place(making, target, scratch)
                _flush(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)
    except BaseException:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()  # only if nothing else is in it
        raise


def check_target(target: Path) -> None:
    """Raise CheckpointError if `target` exists and is not one of ours, or if its place cannot be written to."""
    target = _checked(target)
    above = next(folder for folder in target.parents if folder.exists())
    with _explained(target), tempfile.TemporaryDirectory(dir=above, prefix=_PREFIX.format("check")):
        pass


def is_own(folder: Path) -> bool:
    """Return whether `folder` was written by this package."""
    path = folder / CARD
    return path.is_file() and _MARK in path.read_bytes()


def _checked(target: Path) -> Path:
    """Return `target` without symbolic links; raises CheckpointError if it may not be replaced."""
    try:
        target = target.resolve()
        if target.is_dir():
            if any(target.iterdir()) and not is_own(target):
                raise CheckpointError(
                    f"{target} already exists and was not written by lmcompose: it has no {CARD}; choose another folder"
                )
        elif os.path.lexists(target):
            raise CheckpointError(f"{target} is a file; choose another folder")
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a null character, links in a circle
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return target


def _scratch(target: Path) -> tuple[Path, int]:
    """Create a temporary folder beside `target` and lock it; return its path and the descriptor of the lock."""
    while True:
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
        lock = os.open(scratch, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if scratch.is_dir():
            return scratch, lock
        os.close(lock)  # another process took it for one left behind


def _sweep(target: Path) -> None:
    """Remove temporary folders of killed processes; restore the folder that one was about to replace."""
    for path in target.parent.iterdir():
        if not path.name.startswith(_prefix(target)) or not path.is_dir():
            continue
        with suppress(OSError):  # in use, already removed, or a file system without locks
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (path / _OLD).is_dir() and not target.exists():
                    os.rename(path / _OLD, target)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def _prefix(target: Path) -> str:
    return _PREFIX.format(target.name[:100])


def _place(making: Path, target: Path, scratch: Path) -> None:
    """Rename the whole folder to `target`; an older one moves into `scratch` first and returns after an error."""
    replaces = target.is_dir() and any(target.iterdir())
    if replaces:
        os.rename(target, scratch / _OLD)
    try:
        os.rename(making, target)
    except OSError:
        if replaces:
            os.rename(scratch / _OLD, target)
        raise


def _flush(path: Path) -> None:
    """Write a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the system's errors into one line."""
    try:
        yield
    except OSError as error:
        raise _failure(target, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        # safetensors has an exception of its own for them.
        code = _code_of(error) if type(error).__module__.startswith("safetensors") else None
        if code is None:
            raise
        raise _failure(target, code, os.strerror(code)) from error


def _failure(target: Path, code: int | None, reason: str) -> CheckpointError:
    advice = "free some space, or choose a folder on another disk" if code in _FULL else "choose another folder"
    return CheckpointError(f"{target} cannot be written: {reason}; {advice}")


def _code_of(error: Exception) -> int | None:
    """Return the number in a message such as `I/O error: No space left on device (os error 28)`."""
    _, found, rest = str(error).partition("os error ")
    digits = rest.split(")")[0]
    return int(digits) if found and digits.isdigit() else None
