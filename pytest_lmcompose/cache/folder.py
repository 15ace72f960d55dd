"""The cache folder: finished work under content addresses, shared by runs and processes. Imports no torch.

    VERSION/<first two digits of the address>/<address>/entry.json   description, and the checksums of the files
                                                        ...          the files
    VERSION/making/                                                  entries being written or removed
    VERSION/locks/                                                   a lock for each address, and one for eviction

A finished entry is renamed into place and never changes. The modification time of its entry.json is its last use.
An entry that does not match its checksums is reported, removed and made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pytest_lmcompose.cache.locks import locked
from pytest_lmcompose.cache.parcel import pack, unpack
from pytest_lmcompose.costs import size

VERSION = "2"
"""Version of the layout; other versions are not read."""
ENTRY = "entry.json"
DEFAULT_LIMIT = 20 * 1024**3
"""Bytes."""
ABANDONED = 24 * 3600.0
"""Seconds after which the half-written entries of a killed process are removed."""


@dataclass(frozen=True)
class Entry:
    """A checked entry."""

    folder: Path
    kind: str
    """`state`, `measurements`, `retained` or `facts`."""
    about: dict[str, Any]
    """Plain data that describes it, also used to estimate costs."""


@dataclass(frozen=True)
class Listed:
    """An unchecked entry."""

    folder: Path
    bytes: int
    used: float
    """Time of the last read or write, in seconds since 1970."""


class Cache:
    """Entries in a folder, up to a total size. Problems only cause warnings, and never fail a run."""

    def __init__(self, folder: Path, limit: int, warn: Callable[[str], None]) -> None:
        """Use `folder`, created on the first write, for up to `limit` bytes; `warn` takes a line."""
        self.folder = folder / VERSION
        self.limit = limit
        self.full = False
        """Whether this process stopped writing after an error."""
        self._warn = warn
        self._unseen = self._room = 0
        """Bytes added since the folder was last scanned, and how many may be added before the next scan."""

    def read(self, address: str, kind: str) -> Entry | None:
        """Return the checked entry of this kind at `address`, or None.

        A broken entry, and one made for another address, is reported and removed.
        """
        folder = self._place(address)
        found = _version(folder)
        try:
            entry = _checked(folder, address, kind)
        except FileNotFoundError as error:
            if Path(error.filename) == folder / ENTRY and not folder.exists():
                return None
            entry = f"{Path(error.filename).name} is missing"
        except OSError as error:
            self._warn(f"lmcompose cache: {folder} cannot be read ({error.strerror}); it is made again")
            if isinstance(error, (IsADirectoryError, NotADirectoryError)):
                self.remove(folder)
            return None
        if isinstance(entry, str):
            now = _version(folder)
            if now != found:  # it was evicted meanwhile, and perhaps made again
                return self.read(address, kind)
            if now is not None:
                self._warn(f"lmcompose cache: {folder} is broken ({entry}); it is removed and made again")
                self.remove(folder)
            return None
        used = time.time_ns()  # finer than the default time stamp
        with suppress(OSError):  # the folder may be read-only
            os.utime(folder / ENTRY, ns=(used, used))
        return entry

    def write(self, address: str, kind: str, about: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Make the entry at `address`; `fill` writes its files into the folder it is given.

        If this fails, because the disk is full for example, warn once and write no more entries.
        """
        if self.full:
            return
        try:
            with self._scratch(address[:16]) as scratch:
                making = Path(scratch)
                fill(making)
                files = {path.name: _file(path) for path in sorted(making.iterdir())}
                count = sum(file["bytes"] for file in files.values())
                if count > self.limit // 4:
                    self._warn(
                        f"lmcompose cache: an entry of {size(count)} is more than a quarter of the cache's "
                        f"{size(self.limit)} and is not kept; raise --lmcompose-cache-size"
                    )
                    return
                content = {"address": address, "kind": kind, "about": about, "files": files}
                (making / ENTRY).write_text(json.dumps({**content, "checksum": _checksum(content)}), encoding="utf-8")
                self._publish(making, address, count)
        except (OSError, SafetensorError) as error:
            self.full = True
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._warn(f"lmcompose cache: {self.folder} cannot be written ({reason}); going on without storing")

    def holds(self, address: str) -> bool:
        """Return whether the folder has an entry, unchecked, at `address`."""
        return (self._place(address) / ENTRY).is_file()

    def pack(self, address: str, file: Path) -> None:
        """Write the entry at `address` into one file; raises OSError, also if there is none."""
        pack(self._place(address), file)

    def adopt(self, address: str, file: Path) -> str | None:
        """Make the entry at `address` from a file that `pack` wrote; return what is wrong with it, or None.

        Raises OSError.
        """
        try:
            with self._scratch(address[:16]) as scratch:
                making = Path(scratch)
                unpack(file, making)
                entry = _checked(making, address)
                if isinstance(entry, str):
                    return entry
                self._publish(making, address, file.stat().st_size)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return None

    @contextmanager
    def building(self, address: str, what: str) -> Iterator[None]:
        """Lock the entry at `address`, so that no other process makes it too, if the file system has locks."""

        def waiting(seconds: float) -> None:
            self._warn(f"lmcompose cache: waiting for another process to make {what}")

        with self._locked(f"{address}.lock", waiting):
            yield

    def entries(self) -> list[Listed]:
        """Return all entries, the least recently used first."""
        found = []
        for path in self.folder.glob(f"[0-9a-f][0-9a-f]/*/{ENTRY}"):
            with suppress(OSError):  # evicted meanwhile
                used = path.stat().st_mtime
                found.append(Listed(path.parent, sum(f.stat().st_size for f in path.parent.iterdir()), used))
        return sorted(found, key=lambda entry: (entry.used, entry.folder.name))

    def about(self, entry: Listed) -> tuple[str, dict[str, Any]]:
        """Return the kind and description of an unchecked entry; the kind is `broken` if it cannot be read."""
        try:
            content = _content(entry.folder)
        except OSError:  # evicted meanwhile
            return "broken", {}
        return ("broken", {}) if isinstance(content, str) else (content["kind"], content["about"])

    def remove(self, folder: Path) -> None:
        """Remove an entry at once, so that no process sees a part of it."""
        with suppress(OSError), self._scratch("removed") as scratch, suppress(FileNotFoundError):
            os.rename(folder, Path(scratch) / folder.name)

    def clear(self) -> None:
        """Remove every entry, and the remains of killed processes."""
        for listed in self.entries():
            self.remove(listed.folder)
        self.sweep(older_than=0.0)
        shutil.rmtree(self.folder / "locks", ignore_errors=True)

    def sweep(self, older_than: float = ABANDONED) -> None:
        """Remove half-written entries that are at least `older_than` seconds old."""
        for path in (self.folder / "making").glob("*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime >= older_than:
                    shutil.rmtree(path)

    def _place(self, address: str) -> Path:
        return self.folder / address[:2] / address

    def _make_room(self, added: int) -> None:
        """Evict the least recently used entries until the rest fits.

        The folder is scanned each time this process has added a sixteenth of the limit, so each process may exceed the
        limit by that much.
        """
        self._unseen += added
        if self._unseen < self._room:
            return
        with self._locked("eviction.lock", lambda seconds: None):
            self.sweep()
            entries = self.entries()
            total = sum(entry.bytes for entry in entries)
            for entry in entries:
                if total <= self.limit:
                    break
                self.remove(entry.folder)
                total -= entry.bytes
        self._unseen, self._room = 0, min(self.limit - total, self.limit // 16)

    @contextmanager
    def _locked(self, name: str, waiting: Callable[[float], None]) -> Iterator[None]:
        with ExitStack() as held:
            # Without a lock, on a full or read-only disk, work may be done twice, which does no harm.
            with suppress(OSError, NotImplementedError):
                held.enter_context(locked(self.folder / "locks" / name, waiting))
            yield

    def _scratch(self, prefix: str) -> tempfile.TemporaryDirectory[str]:
        """Return a folder that is removed after use, unless it was published."""
        (self.folder / "making").mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.folder / "making", prefix=f"{prefix}.", ignore_cleanup_errors=True)

    def _publish(self, making: Path, address: str, count: int) -> None:
        """Rename a finished folder to the entry at `address`."""
        place = self._place(address)
        with suppress(FileExistsError):  # another process made the same entry first
            place.parent.mkdir(exist_ok=True)
            _rename(making, place)
            self._make_room(count)


def default_folder(environ: Mapping[str, str]) -> Path:
    """Return the user's default cache folder, from the environment."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcompose"


def _version(folder: Path) -> tuple[int, int] | None:
    """Return what tells a published folder from a later one in its place; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _rename(folder: Path, place: Path) -> None:
    """Rename a folder; raises FileExistsError if there already is one, or OSError."""
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(error.errno, error.strerror, str(place)) from None
        raise


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(folder: Path) -> dict[str, Any] | str:
    """Return the content of an entry.json, or what is wrong with it."""
    try:
        content = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{ENTRY} cannot be read"
    if checksum != _checksum(content) or not content.keys() >= {"address", "kind", "about", "files"}:
        return f"{ENTRY} does not match its checksum"
    return dict(content)


def _checked(folder: Path, address: str, kind: str | None = None) -> Entry | str:
    """Return the entry in `folder` if it is whole and of this address and kind, or what is wrong with it."""
    content = _content(folder)
    if isinstance(content, str):
        return content
    if content["address"] != address:
        return f"it was made for the address {str(content['address'])[:16]}"
    if kind not in (None, content["kind"]):
        return f"its kind is {content['kind']}, not {kind}"
    for name, expected in content["files"].items():
        path = folder / name
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _file(path) != expected:
            return f"{name} does not match its checksum"
    return Entry(folder, content["kind"], content["about"])
