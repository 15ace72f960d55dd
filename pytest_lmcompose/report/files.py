"""Write files atomically.

Character devices such as `/dev/null` and the process's own streams (`/dev/stdout`, `/dev/fd/3`) are written directly.
Folders, block devices, sockets and named pipes are refused.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_LINKS = 40
"""Maximum number of symbolic links to follow, as in Linux."""
_KINDS = {
    stat.S_IFDIR: "this is a folder; give a file in it",
    stat.S_IFBLK: "this is a block device; give a file",
    stat.S_IFSOCK: "this is a socket; give a file",
    stat.S_IFIFO: "this is a named pipe, which may have no reader; give a file, or /dev/stdout",
}
_NEW_FILE = 0o666


class TargetError(ValueError):
    """A path that a report cannot be written to; the message says why."""


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically; links stay links and files keep their permissions.

    Raises OSError, and TargetError for a path that is not a regular file, device or stream.
    """
    if (stream := stream_of(path)) is not None:
        sys.stdout.flush()
        with os.fdopen(os.dup(stream), "w", encoding="utf-8") as file:
            file.write(text)
        return
    found = _stat(path)
    if found is not None and stat.S_ISCHR(found.st_mode):
        with os.fdopen(os.open(path, os.O_WRONLY), "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if found is not None:
            with suppress(PermissionError):  # only root may give a file away
                os.chown(name, found.st_uid, found.st_gid)
        os.chmod(name, stat.S_IMODE(found.st_mode) if found is not None else _NEW_FILE & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def append_text(path: Path, text: str) -> None:
    """Append `text` to `path` atomically, after an empty line."""
    before = path.read_text(encoding="utf-8") if stream_of(path) is None and path.is_file() else ""
    if before:
        before = before.rstrip("\n") + "\n\n"
    write_text(path, before + text)


def path_of(given: str | None, folder: Path) -> Path | None:
    """Return a path that the user gave, relative to `folder`; None if not given."""
    return folder / os.path.expanduser(given) if given else None


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file; False for invalid names."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_target(path: Path) -> None:
    """Check that a report can be written to `path` by creating a temporary file next to it; raises TargetError."""
    if (stream := stream_of(path)) is not None:
        _check_stream(stream)
        return
    try:
        found = _stat(path)
        if found is not None and stat.S_ISCHR(found.st_mode):
            return
        folder = path.resolve().parent
    except OSError as error:
        raise TargetError(f"this cannot be written: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:  # a null character, links in a circle
        raise error if isinstance(error, TargetError) else TargetError(f"this is no path: {error}") from None
    if not folder.is_dir():
        raise TargetError(f"the folder {folder} does not exist; create it first")
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name[:100]}.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise TargetError(f"cannot write in {folder}: {error.strerror}") from None


def check_targets(targets: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Check that all `targets` can be written, that they differ, and that none overwrites one of the `inputs`.

    Keys are names for messages, such as flags. An input folder protects all files in it. Raises TargetError.
    """
    seen: dict[object, str] = {}
    for name, path in targets.items():
        try:
            check_target(path)
        except TargetError as error:
            raise TargetError(f"{name}={path}: {error}") from None
        if (identity := _identity(path)) is None:
            continue
        if (other := seen.setdefault(identity, name)) != name:
            raise TargetError(f"{name}={path}: {other} writes to the same file; use different files")
        for what, read in inputs.items():
            if _is_input(path, read, identity):
                raise TargetError(f"{name}={path}: this is {what}, which the report would overwrite")


def stream_of(path: Path) -> int | None:
    """Return the file descriptor of a path such as /dev/stdout, following links; None for other paths."""
    streams = re.compile(rf"(?:/dev/fd|/proc/(?:self|{os.getpid()})/fd)/(\d+)")
    text = os.path.abspath(path)
    for _ in range(_LINKS):
        if match := streams.fullmatch(text):
            return int(match[1])
        try:
            folder = os.path.realpath(os.path.dirname(text))
            if match := streams.fullmatch(os.path.join(folder, os.path.basename(text))):
                return int(match[1])
            text = os.path.normpath(os.path.join(folder, os.readlink(text)))
        except (OSError, ValueError):
            return None
    return None


def check_folder(path: Path) -> None:
    """Check that `path` is a folder or can be created; raises TargetError."""
    try:
        there = next(above for above in (path, *path.parents) if os.path.lexists(above))
        if not there.is_dir():
            raise TargetError(f"this is not a folder: {there}")
    except OSError as error:
        raise TargetError(f"this is no folder: {error.strerror}") from None


def _check_stream(stream: int) -> None:
    try:
        reads_only = fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError as error:
        raise TargetError(f"this stream is not open: {error.strerror}") from None
    if reads_only:
        raise TargetError("this stream can only be read")


def _stat(path: Path) -> os.stat_result | None:
    """Return the status of the file at `path`, following links; None if missing. Raises OSError and TargetError."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if (problem := _KINDS.get(stat.S_IFMT(found.st_mode))) is not None:
        raise TargetError(problem)
    return found


def _identity(path: Path) -> object:
    """Return a key that is equal for two names of one file; None for devices, which may be written twice."""
    if (stream := stream_of(path)) is not None:
        return stream
    found = _stat(path)
    if found is None:
        return str(path.resolve()).casefold()  # some file systems ignore case
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _is_input(path: Path, read: Path, identity: object) -> bool:
    if read.is_dir():
        return path.is_file() and path.resolve().is_relative_to(read.resolve())
    with suppress(TargetError):
        return _identity(read) == identity
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
