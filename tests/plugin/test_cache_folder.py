"""The cache folder: what is read, written, evicted and repaired, by one process and by several."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.cache import folder
from pytest_lmcompose.cache.folder import ENTRY, Cache, default_folder

ROOT = Path(__file__).parents[2]
A, B, C, D = (letter * 64 for letter in "abcd")


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, told: list[str]) -> Cache:
    return Cache(tmp_path / "store", 10_000, told.append)


def fill(size: int, name: str = "data") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(b"x" * size)

    return write


def keep(store: Cache, address: str, size: int = 100, about: dict[str, Any] | None = None) -> None:
    store.write(address, "state", about or {}, fill(size))


def script(code: str, *arguments: str) -> subprocess.Popen[str]:
    head = "import sys, time, os\nfrom pathlib import Path\nfrom pytest_lmcompose.cache.folder import Cache\n"
    command = [sys.executable, "-c", head + code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_an_entry_comes_back_as_it_was_written(store: Cache, told: list[str]) -> None:
    assert store.read(A, "state") is None and not store.folder.exists()
    keep(store, A, 100, {"composition": "memit+awq", "loss": float("inf")})
    entry = store.read(A, "state")
    assert entry is not None and entry.kind == "state"
    assert entry.about == {"composition": "memit+awq", "loss": float("inf")}
    assert (entry.folder / "data").read_bytes() == b"x" * 100
    assert store.read(B, "state") is None
    keep(store, A, 200)  # somebody else made it meanwhile: the first one stays
    assert (entry.folder / "data").stat().st_size == 100
    assert not list((store.folder / "making").iterdir())
    assert told == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: flip(folder / "data"), "data does not match its checksum"),
        (lambda folder: os.truncate(folder / "data", 40), "data has 40 bytes instead of 100"),
        (lambda folder: (folder / "data").unlink(), "data is missing"),
        (lambda folder: (folder / ENTRY).unlink(), "entry.json is missing"),
        (lambda folder: os.truncate(folder / ENTRY, 30), "entry.json cannot be read"),
        (lambda folder: (folder / ENTRY).write_text("[]"), "entry.json cannot be read"),
        (
            lambda folder: (folder / ENTRY).write_text((folder / ENTRY).read_text().replace("0.5", "0.7")),
            "entry.json does not match its checksum",
        ),
    ],
)
def test_a_broken_entry_is_told_removed_and_made_again(
    store: Cache, told: list[str], damage: Callable[[Path], None], reason: str
) -> None:
    keep(store, A, about={"loss": 0.5})
    entry = store.read(A, "state")
    assert entry is not None
    damage(entry.folder)
    assert store.read(A, "state") is None
    assert len(told) == 1 and f"is broken ({reason}); it is removed and made again" in told[0]
    keep(store, A)
    assert store.read(A, "state") is not None and len(told) == 1


def test_what_a_killed_process_was_writing_is_never_seen_and_swept_away(store: Cache, told: list[str]) -> None:
    keep(store, B)
    code = f"""
def write(folder):
    (folder / "data").write_bytes(b"x" * 50)
    print("writing", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1]), 10_000, print).write("{A}", "state", {{}}, write)
"""
    process = script(code, str(store.folder.parent))
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list((store.folder / "making").iterdir())) == 1
    assert store.read(A, "state") is None and store.read(B, "state") is not None and told == []
    store.sweep()
    assert len(list((store.folder / "making").iterdir())) == 1  # it might be alive
    store.sweep(older_than=0)
    assert not list((store.folder / "making").iterdir())
    keep(store, A)
    assert store.read(A, "state") is not None


def test_processes_make_an_entry_once_between_them(store: Cache) -> None:
    code = f"""
store = Cache(Path(sys.argv[1]), 10_000, print)
def write(folder):
    time.sleep(0.3)
    (folder / "data").write_text(str(os.getpid()))
with store.building("{A}", "it"):
    if store.read("{A}", "state") is None:
        print("made")
        store.write("{A}", "state", {{}}, write)
print((store.read("{A}", "state").folder / "data").read_text())
"""
    processes = [script(code, str(store.folder.parent)) for _ in range(3)]
    lines = [process.communicate()[0].split() for process in processes]
    assert sum(line[0] == "made" for line in lines) == 1
    assert len({line[-1] for line in lines}) == 1


def test_a_lock_dies_with_its_process(store: Cache) -> None:
    code = f"""
with Cache(Path(sys.argv[1]), 10_000, print).building("{A}", "it"):
    print("held", flush=True)
    time.sleep(60)
"""
    process = script(code, str(store.folder.parent))
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    with store.building(A, "it"):  # which waits for as long as another process holds the lock
        pass


def test_processes_that_write_read_and_evict_at_once_break_nothing(store: Cache, told: list[str]) -> None:
    code = """
import random
generator = random.Random(int(sys.argv[2]))
told = []
store = Cache(Path(sys.argv[1]), 5_000, told.append)
for _ in range(60):
    letter = generator.choice("0123456789abcdef")
    entry = store.read(letter * 64, "state")
    if entry is None:
        store.write(letter * 64, "state", {}, lambda f: (f / "data").write_bytes(letter.encode() * 800) and None)
    else:
        assert (not entry.folder.exists()) or entry.kind == "state"
print(told, store.full)
"""
    processes = [script(code, str(store.folder.parent), str(i)) for i in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["[] False"] * 3
    listed = store.entries()
    assert listed and sum(entry.bytes for entry in listed) <= 5_000
    assert all(store.read(entry.folder.name, "state") is not None for entry in listed) and told == []


def test_an_entry_that_is_evicted_and_made_again_while_it_is_read_is_read_again(
    store: Cache, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(store, A, 100)
    checked, reads = folder._checked, []

    def meanwhile(place: Path, *rest: Any) -> Any:
        reads.append(place)
        if len(reads) == 1:
            store.remove(place)
            keep(store, A, 200)
            raise FileNotFoundError(2, "gone", str(place / "data"))
        return checked(place, *rest)

    monkeypatch.setattr(folder, "_checked", meanwhile)
    entry = store.read(A, "state")
    assert entry is not None and (entry.folder / "data").stat().st_size == 200
    assert len(reads) == 2 and told == []


def test_the_least_recently_used_go_first(tmp_path: Path, told: list[str]) -> None:
    store = Cache(tmp_path, 4 * 800, told.append)
    for age, address in enumerate((A, B, C)):
        keep(store, address, 600)
        os.utime(store.folder / address[:2] / address / ENTRY, (1000 + age, 1000 + age))
    assert store.read(A, "state") is not None  # it counts as used now
    keep(store, D, 600)
    keep(store, "e" * 64, 600)
    assert [entry.folder.name[0] for entry in store.entries()] == ["a", "d", "e"]
    assert sum(entry.bytes for entry in store.entries()) <= store.limit
    assert told == []


def test_a_store_counts_what_other_processes_add(tmp_path: Path, told: list[str]) -> None:
    one, other = (Cache(tmp_path, 3 * 800, told.append) for _ in range(2))
    for i in range(8):
        keep((one, other)[i % 2], f"{i:x}" * 64, 600)
    keep(one, A, 600)
    assert sum(entry.bytes for entry in one.entries()) <= 2 * one.limit
    assert one.read(A, "state") is not None


def test_an_entry_too_large_for_the_store_is_not_kept(store: Cache, told: list[str]) -> None:
    keep(store, A, 2_501)
    assert store.entries() == [] and not store.full
    assert "2.4 KiB is more than a quarter of the cache's 9.8 KiB" in told[0]
    assert "--lmcompose-cache-size" in told[0]


def test_a_full_disk_is_told_once_and_the_work_goes_on(store: Cache) -> None:
    # The system refuses files beyond a size, as it does on a full disk, in the middle of a write.
    code = f"""
told = []
store = Cache(Path(sys.argv[1]), 10_000_000, told.append)
store.write("{A}", "state", {{}}, lambda f: (f / "data").write_bytes(b"x" * 1000) and None)
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
def save(folder):
    from safetensors.numpy import save_file
    import numpy
    save_file({{"a": numpy.zeros(100_000)}}, folder / "data")
for address, write in (("{B}", save), ("{C}", lambda f: (f / "data").write_bytes(b"x") and None)):
    store.write(address, "state", {{}}, write)
print(len(told), store.full, "going on without storing" in told[0], sep="\\n")
"""
    process = script(code, str(store.folder.parent))
    assert process.communicate()[0].split("\n")[:3] == ["1", "True", "True"]
    assert store.read(A, "state") is not None and store.read(B, "state") is None
    assert not list((store.folder / "making").iterdir())


@pytest.mark.parametrize("error", [28, 122, 30, 13])
def test_a_disk_that_takes_nothing_more(
    store: Cache, told: list[str], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(error, os.strerror(error))

    store.write(A, "state", {}, refuse)
    keep(store, B)
    assert store.full and store.entries() == []
    assert len(told) == 1 and os.strerror(error) in told[0]


def test_errors_of_the_work_itself_pass_on_and_leave_nothing(store: Cache) -> None:
    def refuse(folder: Path) -> None:
        raise KeyError("tensor")

    with pytest.raises(KeyError):
        store.write(A, "state", {}, refuse)
    assert store.read(A, "state") is None and not list((store.folder / "making").iterdir())


def test_what_is_listed_and_cleared(store: Cache) -> None:
    keep(store, A, about={"composition": "memit"})
    keep(store, B)
    (store.folder / B[:2] / B / ENTRY).write_text("{")
    assert dict(sorted((e.folder.name, store.about(e)) for e in store.entries())) == {
        A: ("state", {"composition": "memit"}),
        B: ("broken", {}),
    }
    store.clear()
    assert store.entries() == [] and store.read(A, "state") is None


def test_a_changed_layout_is_not_read(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store, A)
    monkeypatch.setattr("pytest_lmcompose.cache.folder.VERSION", "3")
    newer = Cache(store.folder.parent, 10_000, print)
    assert newer.read(A, "state") is None and newer.entries() == []


def test_the_default_folder_is_the_users_cache() -> None:
    assert default_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/lmcompose")
    assert default_folder({}) == Path.home() / ".cache" / "lmcompose"


def test_entries_are_plain_json_that_names_each_file(store: Cache) -> None:
    keep(store, A, 5)
    content = json.loads((store.folder / A[:2] / A / ENTRY).read_text())
    assert content["files"]["data"]["bytes"] == 5
    assert len(content["files"]["data"]["sha256"]) == len(content["checksum"]) == 64


def test_an_entry_under_the_address_of_another_is_not_served(store: Cache, told: list[str]) -> None:
    keep(store, A, 10)
    keep(store, B, 20)
    one, other = (store.folder / address[:2] / address for address in (A, B))
    one.rename(store.folder / "swapped")
    other.rename(one)
    (store.folder / "swapped").rename(other)
    assert store.read(A, "state") is None and store.read(B, "state") is None
    assert [line.count("it was made for the address") for line in told] == [1, 1]
    keep(store, A, 10)
    entry = store.read(A, "state")
    assert entry is not None and (entry.folder / "data").stat().st_size == 10


def test_an_entry_of_another_kind_is_not_served(store: Cache, told: list[str]) -> None:
    keep(store, A, 10)
    assert store.read(A, "measurements") is None
    assert len(told) == 1 and "its kind is state, not measurements" in told[0]


@pytest.mark.parametrize("place", ["", "entry.json", "data"])
def test_what_stands_in_place_of_a_file_or_folder_is_replaced(store: Cache, told: list[str], place: str) -> None:
    keep(store, A, 10)
    path = store.folder / A[:2] / A / place
    if place:
        path.unlink()
        path.mkdir()
    else:
        shutil.rmtree(path)
        path.write_text("a file")
    assert store.read(A, "state") is None and len(told) == 1
    keep(store, A, 10)
    assert store.read(A, "state") is not None and len(told) == 1
