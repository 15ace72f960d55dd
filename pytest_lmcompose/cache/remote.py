"""A store under a URL, such as s3://bucket/folder, for machines without a file system in common. No torch.

Each entry is one object, VERSION/<first two of the address>/<address>.tar, beside a folder on this machine
that works as any store does. An object is written under another name first, and checked when it is
fetched. There are no locks between machines: two of them may make the same entry at once, which does no
harm, since either is the right one. Nothing is ever evicted there.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_lmcompose.cache.folder import VERSION, Entry, Store, default_folder

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")
_LOCAL = re.compile(r"(?:file|local)://")
_Found = TypeVar("_Found")


def is_url(text: str) -> bool:
    """Say whether `text` names a store by URL; one of a local folder is a folder."""
    return _URL.match(text) is not None and _LOCAL.match(text) is None


def local_path(text: str) -> str:
    """Return the path of a folder, which may be given as file://."""
    return _LOCAL.sub("", text)


def front_folder(url: str, environ: Mapping[str, str]) -> Path:
    """Return this machine's folder of what is under `url`."""
    return default_folder(environ) / "remote" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def check_url(url: str) -> None:
    """Make sure that there is a library for this kind of URL; raises ValueError that says what to install."""
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None


class RemoteStore(Store):
    """The entries under a URL, and a folder on this machine before them. Never fails a run either."""

    def __init__(self, url: str, folder: Path, limit: int, tell: Callable[[str], None]) -> None:
        """Use what is under `url`, of any kind that fsspec knows; `folder` holds up to `limit` bytes of it."""
        super().__init__(folder, limit, tell)
        self.url = url
        self._name = re.sub(r"//[^/@]*@", "//", url)  # without a password
        self.lost = False
        """Whether this process has given up on the URL."""

    def read(self, address: str, kind: str) -> Entry | None:
        """Return the entry at `address`, from here or from there, or None; see `Store.read`."""
        entry = super().read(address, kind)
        if entry is None and self._reached(lambda: self._fetch(address)):
            entry = super().read(address, kind)
        return entry

    def write(self, address: str, kind: str, about: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Make the entry at `address`, here and there; see `Store.write`."""
        super().write(address, kind, about, fill)
        self._reached(lambda: self._send(address))

    def _fetch(self, address: str) -> bool:
        system, place = self._place_there(address)
        if not system.exists(place):
            return False
        with self._scratch() as scratch:
            file = Path(scratch) / "entry.tar"
            system.get_file(place, str(file))
            problem = self.adopt(address, file)
        if problem is not None:
            self._tell(f"lmcompose store: {place} under {self._name} is broken ({problem}); it is made again")
            system.rm_file(place)
        return problem is None

    def _send(self, address: str) -> None:
        system, place = self._place_there(address)
        if system.exists(place):
            return
        root = place.rsplit("/", 2)[0]
        making = f"{root}/making/{uuid.uuid4().hex}.tar"
        with self._scratch() as scratch:
            file = Path(scratch) / "entry.tar"
            try:
                self.pack(address, file)
            except FileNotFoundError:  # not kept here, or evicted meanwhile
                return
            for folder in (f"{root}/making", place.rsplit("/", 1)[0]):
                system.makedirs(folder, exist_ok=True)
            system.put_file(str(file), making)
        try:
            system.mv(making, place)
        except Exception:
            with suppress(Exception):
                system.rm_file(making)
            if not system.exists(place):  # else another machine was first
                raise

    def _place_there(self, address: str) -> tuple[Any, str]:
        """Return the file system behind the URL, and where in it an entry is."""
        from fsspec.core import url_to_fs

        system, root = url_to_fs(self.url, use_listings_cache=False)
        return system, f"{root.rstrip('/')}/{VERSION}/{address[:2]}/{address}.tar"

    def _reached(self, do: Callable[[], _Found]) -> _Found | None:
        """Do something there; if that fails, tell it once and go on without."""
        if self.lost:
            return None
        try:
            return do()
        except Exception as error:  # every kind of file system has its own
            self.lost = True
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._tell(f"lmcompose store: {self._name} cannot be used ({reason}); going on without it")
            return None

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        (self.folder / "making").mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.folder / "making", prefix="parcel.", ignore_cleanup_errors=True)
