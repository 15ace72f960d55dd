"""A cache under a URL, such as s3://bucket/folder, for machines without a common file system. Imports no torch.

Each entry is one object, VERSION/<first two digits of the address>/<address>.tar; a local cache folder is in front of
it. An object is uploaded under a temporary name, and checked when it is fetched. There are no locks between machines:
two of them may make the same entry, which does no harm, since both are right. Remote entries are never evicted.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_lmcompose.cache.folder import VERSION, Cache, Entry, default_folder

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")
_LOCAL = re.compile(r"(?:file|local)://")
_Found = TypeVar("_Found")


def is_url(text: str) -> bool:
    """Return whether `text` is a URL, other than that of a local folder."""
    return _URL.match(text) is not None and _LOCAL.match(text) is None


def local_path(text: str) -> str:
    """Return the path of a folder, given as a path or as file://."""
    return _LOCAL.sub("", text)


def front_folder(url: str, environ: Mapping[str, str]) -> Path:
    """Return the local folder in front of `url`."""
    return default_folder(environ) / "remote" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def check_url(url: str) -> None:
    """Raise ValueError, which says what to install, if no library supports this kind of URL."""
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None


class RemoteCache(Cache):
    """Entries under a URL, with a local folder in front. Problems only cause warnings."""

    def __init__(self, url: str, folder: Path, limit: int, warn: Callable[[str], None]) -> None:
        """Use `url`, of any kind that fsspec supports; `folder` holds up to `limit` bytes of its entries."""
        super().__init__(folder, limit, warn)
        self.url = url
        self._name = re.sub(r"//[^/@]*@", "//", url)  # without a password
        self.lost = False
        """Whether this process stopped using the URL after an error."""

    def read(self, address: str, kind: str) -> Entry | None:
        """Return the entry at `address`, local or remote, or None; see `Cache.read`."""
        entry = super().read(address, kind)
        if entry is None and self._reached(lambda: self._fetch(address)):
            entry = super().read(address, kind)
        return entry

    def write(self, address: str, kind: str, about: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Make the entry at `address`, local and remote; see `Cache.write`."""
        super().write(address, kind, about, fill)
        self._reached(lambda: self._send(address))

    def _fetch(self, address: str) -> bool:
        system, place = self._place_there(address)
        if not system.exists(place):
            return False
        with self._scratch("parcel") as scratch:
            file = Path(scratch) / "entry.tar"
            system.get_file(place, str(file))
            problem = self.adopt(address, file)
        if problem is not None:
            self._warn(f"lmcompose cache: {place} under {self._name} is broken ({problem}); it is made again")
            system.rm_file(place)
        return problem is None

    def _send(self, address: str) -> None:
        system, place = self._place_there(address)
        if system.exists(place):
            return
        root = place.rsplit("/", 2)[0]
        making = f"{root}/making/{uuid.uuid4().hex}.tar"
        with self._scratch("parcel") as scratch:
            file = Path(scratch) / "entry.tar"
            try:
                self.pack(address, file)
            except FileNotFoundError:  # too large to keep, or evicted meanwhile
                return
            for folder in (f"{root}/making", place.rsplit("/", 1)[0]):
                system.makedirs(folder, exist_ok=True)
            system.put_file(str(file), making)
        try:
            system.mv(making, place)
        except Exception:
            with suppress(Exception):
                system.rm_file(making)
            if not system.exists(place):  # otherwise another machine was first
                raise

    def _place_there(self, address: str) -> tuple[Any, str]:
        """Return the remote file system and the path of an entry in it."""
        from fsspec.core import url_to_fs

        system, root = url_to_fs(self.url, use_listings_cache=False)
        return system, f"{root.rstrip('/')}/{VERSION}/{address[:2]}/{address}.tar"

    def _reached(self, do: Callable[[], _Found]) -> _Found | None:
        """Call `do`; after an error, warn once and stop using the URL."""
        if self.lost:
            return None
        try:
            return do()
        except Exception as error:  # every file system raises errors of its own
            self.lost = True
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._warn(f"lmcompose cache: {self._name} cannot be used ({reason}); going on without it")
            return None
