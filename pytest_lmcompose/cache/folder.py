"""A folder of finished work under content addresses, shared by runs and processes. Imports no torch.

    VERSION/<first two of the address>/<address>/entry.json   what it is, and the checksums of its files
                                                 ...          its files
    VERSION/making/                                           entries that are being written or removed
    VERSION/locks/                                            one lock for each address, and one for eviction

An entry appears whole, by a rename, and never changes afterwards. When it was last used is the time
of modification of its entry.json. What does not match its checksums is reported, removed and made again.
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
"""Of the layout; another one is not read."""
ENTRY = "entry.json"
DEFAULT_LIMIT = 20 * 1024**3
"""Bytes."""
ABANDONED = 24 * 3600.0
"""Seconds after which what a killed process left half-written is removed."""


@dataclass(frozen=True)
class Entry:
    """One finished piece of work, checked."""

    folder: Path
    kind: str
    """`state` or `measurements`."""
    about: dict[str, Any]
    """Plain data about it; for a reader, and for estimates of cost."""


@dataclass(frozen=True)
class Listed:
    """An entry as it stands in the folder, unchecked."""

    folder: Path
    bytes: int
    used: float
    """When it was last read or made: seconds since 1970."""


class Store:
    """Entries in a folder, up to a total size. Never fails a run: what cannot be stored is told and left."""

    def __init__(self, folder: Path, limit: int, tell: Callable[[str], None]) -> None:
        """Use `folder`, made when first written to, for up to `limit` bytes; `tell` takes a line."""
        self.folder = folder / VERSION
        self.limit = limit
        self.full = False
        """Whether this process has given up storing."""
        self._tell = tell
        self._unseen = self._room = 0
        """Bytes added since the folder was looked through, and how many may be until it is again."""

    def read(self, address: str, kind: str) -> Entry | None:
        """Return the entry of this kind that was made for `address`, after checking its files, or None.

        A broken one, and one that was made for another address, is reported and removed.
        """
        folder = self._place(address)
        try:
            entry = _checked(folder, address, kind)
        except FileNotFoundError as error:
            if Path(error.filename) == folder / ENTRY and not folder.exists():
                return None
            entry = f"{Path(error.filename).name} is missing"
        except OSError as error:
            self._tell(f"lmcompose store: {folder} cannot be read ({error.strerror}); it is made again")
            if isinstance(error, (IsADirectoryError, NotADirectoryError)):
                self.remove(folder)
            return None
        if isinstance(entry, str):
            if folder.exists():  # and not evicted meanwhile
                self._tell(f"lmcompose store: {folder} is broken ({entry}); it is removed and made again")
                self.remove(folder)
            return None
        now = time.time_ns()  # finer than what the system sets by itself
        with suppress(OSError):  # a folder that may only be read
            os.utime(folder / ENTRY, ns=(now, now))
        return entry

    def write(self, address: str, kind: str, about: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Make the entry at `address`: `fill` writes its files into the folder it is given.

        If that is not possible, a full disk for instance, this is told once and nothing is stored any more.
        """
        if self.full:
            return
        making: Path | None = None
        try:
            (self.folder / "making").mkdir(parents=True, exist_ok=True)
            making = Path(tempfile.mkdtemp(dir=self.folder / "making", prefix=f"{address[:16]}."))
            fill(making)
            files = {path.name: _file(path) for path in sorted(making.iterdir())}
            count = sum(file["bytes"] for file in files.values())
            if count > self.limit // 4:
                self._tell(
                    f"lmcompose store: an entry of {size(count)} is more than a quarter of the store's "
                    f"{size(self.limit)} and is not kept; raise --lmcompose-cache-size"
                )
                return
            content = {"address": address, "kind": kind, "about": about, "files": files}
            (making / ENTRY).write_text(json.dumps({**content, "checksum": _checksum(content)}), encoding="utf-8")
            place = self._place(address)
            place.parent.mkdir(exist_ok=True)
            _rename(making, place)
            self._make_room(count)
        except FileExistsError:  # another process has made the same entry: then all is well
            pass
        except (OSError, SafetensorError) as error:
            self._give_up(error)
        finally:
            if making is not None:
                shutil.rmtree(making, ignore_errors=True)

    def holds(self, address: str) -> bool:
        """Say whether there is an entry at `address` in the folder, which is not checked."""
        return (self._place(address) / ENTRY).is_file()

    def pack(self, address: str, file: Path) -> None:
        """Write the entry at `address` into one file; raises OSError, also where there is none."""
        pack(self._place(address), file)

    def adopt(self, address: str, file: Path) -> str | None:
        """Make the entry at `address` from what `pack` wrote; return what is wrong with it, or None.

        Raises OSError.
        """
        (self.folder / "making").mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=self.folder / "making", prefix=f"{address[:16]}."))
        try:
            unpack(file, making)
            entry = _checked(making, address)
            if isinstance(entry, str):
                return entry
            place = self._place(address)
            place.parent.mkdir(exist_ok=True)
            with suppress(FileExistsError):  # another process was first
                _rename(making, place)
            self._make_room(file.stat().st_size)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        return None

    @contextmanager
    def building(self, address: str, what: str) -> Iterator[None]:
        """Hold the right to make the entry at `address`, so that processes do not make it twice.

        Where there are no locks, the work is done without.
        """

        def waiting(seconds: float) -> None:
            self._tell(f"lmcompose store: waiting for another process that makes {what}")

        with self._locked(f"{address}.lock", waiting):
            yield

    def entries(self) -> list[Listed]:
        """Return what is in the folder, the least recently used first."""
        found = []
        for path in self.folder.glob(f"[0-9a-f][0-9a-f]/*/{ENTRY}"):
            with suppress(OSError):  # evicted meanwhile
                used = path.stat().st_mtime
                found.append(Listed(path.parent, sum(f.stat().st_size for f in path.parent.iterdir()), used))
        return sorted(found, key=lambda entry: (entry.used, entry.folder.name))

    def about(self, entry: Listed) -> tuple[str, dict[str, Any]]:
        """Return kind and `about` of an entry, `broken` and nothing if they cannot be read.

        Its files are not checked, and it does not count as used.
        """
        try:
            content = _content(entry.folder)
        except OSError:  # evicted meanwhile
            return "broken", {}
        return ("broken", {}) if isinstance(content, str) else (content["kind"], content["about"])

    def remove(self, folder: Path) -> None:
        """Remove an entry, so that no process sees half of it."""
        with suppress(OSError):
            (self.folder / "making").mkdir(parents=True, exist_ok=True)
            grave = Path(tempfile.mkdtemp(dir=self.folder / "making", prefix="removed."))
            with suppress(FileNotFoundError):
                os.rename(folder, grave / folder.name)
            shutil.rmtree(grave, ignore_errors=True)

    def clear(self) -> None:
        """Remove every entry, and what killed processes left."""
        for listed in self.entries():
            self.remove(listed.folder)
        self.sweep(older_than=0.0)
        shutil.rmtree(self.folder / "locks", ignore_errors=True)

    def sweep(self, older_than: float = ABANDONED) -> None:
        """Remove what processes that were killed left half-written, `older_than` seconds ago or more."""
        for path in (self.folder / "making").glob("*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime >= older_than:
                    shutil.rmtree(path)

    def _place(self, address: str) -> Path:
        return self.folder / address[:2] / address

    def _make_room(self, added: int) -> None:
        """Evict the least recently used entries until all fit, the newest of them too.

        The folder is looked through after every sixteenth of the limit that this process has added: by so
        much each process may exceed it.
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
            # Without a lock, as on a disk that is full or may only be read, work may be done twice: no harm.
            with suppress(OSError, NotImplementedError):
                held.enter_context(locked(self.folder / "locks" / name, waiting))
            yield

    def _give_up(self, error: Exception) -> None:
        self.full = True
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._tell(f"lmcompose store: {self.folder} cannot be written ({reason}); going on without storing")


def default_folder(environ: Mapping[str, str]) -> Path:
    """Return the user's own store, in the cache folder that the environment names."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcompose"


def _rename(folder: Path, place: Path) -> None:
    """Rename a folder; raises FileExistsError where there is one of that name already, OSError."""
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
    """Return what an entry.json says, or what is wrong with it."""
    try:
        content = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{ENTRY} cannot be read"
    if checksum != _checksum(content) or not content.keys() >= {"address", "kind", "about", "files"}:
        return f"{ENTRY} does not match its checksum"
    return dict(content)


def _checked(folder: Path, address: str, kind: str | None = None) -> Entry | str:
    """Return the entry in `folder`, which was made for `address`, or what is wrong with it; None: of any kind."""
    content = _content(folder)
    if isinstance(content, str):
        return content
    if content["address"] != address:
        return f"it was made for the address {str(content['address'])[:16]}"
    if kind not in (None, content["kind"]):
        return f"it holds a {content['kind']} and no {kind}"
    for name, expected in content["files"].items():
        path = folder / name
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _file(path) != expected:
            return f"{name} does not match its checksum"
    return Entry(folder, content["kind"], content["about"])
