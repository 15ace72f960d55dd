"""Stores under a URL: in memory, and on a server of another protocol than files."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.remote import RemoteCache, front_folder, is_url, local_path
from pytest_lmcompose.cli import main
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_cache import IDS, STEPS, applied, measured

A, B = "a" * 64, "b" * 64


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of a folder in this process's memory."""
    yield "memory://shared/store"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def ftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a folder on an FTP server."""
    folder = tmp_path_factory.mktemp("ftp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pyftpdlib", "-i", "127.0.0.1", "-p", str(port), "-w", "-d", str(folder)]
    server = subprocess.Popen([*command, "-u", "user", "-P", "secret"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    yield f"ftp://user:secret@127.0.0.1:{port}/store"
    server.kill()
    server.wait()


@pytest.fixture(params=["memory", "ftp"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


class Machine:
    """A machine with a folder of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self.told: list[str] = []
        self.store = RemoteCache(url, folder, 10**6, self.told.append)

    def make(self, address: str, content: bytes = b"weights") -> None:
        self.store.write(address, "state", {"x": 1}, lambda folder: (folder / "data").write_bytes(content) and None)

    def content(self, address: str) -> bytes | None:
        entry = self.store.read(address, "state")
        return None if entry is None else (entry.folder / "data").read_bytes()

    def objects(self) -> list[str]:
        system, place = self.store._place_there(A)
        return sorted(path for path in system.find(place.rsplit("/", 2)[0]) if path.endswith(".tar"))


def test_what_one_machine_made_another_reads(url: str, tmp_path: Path) -> None:
    one, two = (Machine(url, tmp_path / name) for name in ("one", "two"))
    assert two.content(A) is None
    one.make(A)
    assert [two.content(A), two.content(B), one.content(A)] == [b"weights", None, b"weights"]
    assert len(two.objects()) == 1 and two.objects()[0].endswith(f"/2/aa/{A}.tar")  # and nothing half-made
    fsspec.filesystem("memory").store.clear()
    assert two.content(A) == b"weights"  # it is here now
    assert one.told == two.told == []


def test_both_may_make_the_same_at_once(url: str, tmp_path: Path) -> None:
    one, two = (Machine(url, tmp_path / name) for name in ("one", "two"))
    exists = type(one.store._place_there(A)[0]).exists
    system = one.store._place_there(A)[0]
    # Neither sees that the other sends.
    answers = iter([False, False, True])
    system.exists = lambda path, **kwargs: next(answers, None) or exists(system, path)
    try:
        one.make(B)
        two.make(B)
    finally:
        del system.exists
    assert one.told == two.told == []
    assert Machine(url, tmp_path / "three").content(B) == b"weights"
    assert len([path for path in one.objects() if path.endswith(f"{B}.tar")]) == len(
        [path for path in one.objects() if B[:2] in path.rsplit("/", 2)[1]]
    )


@pytest.mark.parametrize("keep", [0, 700, 10_000])
def test_a_broken_object_is_told_and_made_again(memory: str, tmp_path: Path, keep: int) -> None:
    one, two = (Machine(memory, tmp_path / name) for name in ("one", "two"))
    one.make(A, b"weights" * 1000)
    system, place = one.store._place_there(A)
    whole = system.cat_file(place)
    system.pipe_file(place, whole[:keep] + b"\1" * (len(whole) - keep if keep > 1000 else 0))
    assert two.content(A) is None
    assert len(two.told) == 1 and "is broken (" in two.told[0] and "made again" in two.told[0]
    assert one.objects() == []
    two.make(A, b"weights" * 1000)
    assert Machine(memory, tmp_path / "three").content(A) == b"weights" * 1000


def test_an_object_cannot_write_outside_its_folder(memory: str, tmp_path: Path) -> None:
    import io
    import tarfile

    one = Machine(memory, tmp_path / "one")
    system, place = one.store._place_there(A)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as parcel:
        parcel.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
    system.pipe_file(place, buffer.getvalue())
    assert one.content(A) is None
    assert "not a file of an entry" in one.told[0] and not list(tmp_path.rglob("escaped"))


def test_a_server_that_is_gone_is_told_once_and_done_without(tmp_path: Path) -> None:
    one = Machine("ftp://user:secret@127.0.0.1:9/store", tmp_path)
    one.make(A)
    one.make(B)
    assert [one.content(A), one.content(B)] == [b"weights", b"weights"]
    assert len(one.told) == 1 and "going on without it" in one.told[0] and "secret" not in one.told[0]


def test_what_a_url_is() -> None:
    assert [is_url(text) for text in ("s3://a/b", "memory://x", "file:///a", "local:///a", "/a", "a/b")] == [
        True,
        True,
        *[False] * 4,
    ]
    assert [local_path(text) for text in ("file:///a/b", "local://b", "c")] == ["/a/b", "b", "c"]


def test_a_run_on_a_url(project: Project, memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project.arguments[project.arguments.index(NO_CACHE)] = f"--lmcompose-cache-dir={memory}"
    for name, steps, anew in (("one", STEPS, [*IDS]), ("two", [], [])):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        result = project.run(compose=IDS)
        result.assert_outcomes(passed=3)
        assert applied(result) == steps and measured(result, IDS) == anew
        assert front_folder(memory, {"XDG_CACHE_HOME": str(tmp_path / name)}).is_dir()


def test_a_file_url_is_a_folder(project: Project) -> None:
    project.arguments[project.arguments.index(NO_CACHE)] = f"--lmcompose-cache-dir=file://{project.path}/store"
    project.run(compose=IDS[:1]).assert_outcomes(passed=1)
    cache = Cache(project.path / "store", 0, print)
    kinds = sorted(kind for kind, _ in map(cache.about, cache.entries()))
    assert kinds == ["facts", "measurements", "measurements", "state"]


def test_a_url_that_nothing_knows_is_refused(project: Project, refused: Callable[..., str]) -> None:
    project.arguments.remove(NO_CACHE)
    assert "--lmcompose-cache-dir: nowhere://x: Protocol not known: nowhere" in refused(
        "--lmcompose-cache-dir=nowhere://x"
    )


def test_the_command_looks_after_folders_alone(tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["cache", "clear", "--cache-dir=s3://bucket/store"])
    assert refused.exit_code == 2 and "s3://bucket/store is not a folder" in refused.output
    shown = CliRunner().invoke(main, ["cache", "show", f"--cache-dir=file://{tmp_path}"])
    assert shown.output.startswith(f"{tmp_path}/2: 0 entries")
