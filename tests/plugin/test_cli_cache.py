"""`lmcompose cache`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    store = Cache(tmp_path / "lmcompose", 10**6, print)
    for letter, kind, name in (("a", "state", "memit"), ("b", "measurements", "memit"), ("c", "state", "memit+awq")):
        about = {"composition": name}
        store.write(letter * 64, kind, about, lambda folder: (folder / "data").write_bytes(b"x" * 2048) and None)
    return store


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments])


def test_show_counts_entries_by_kind(store: Cache) -> None:
    result = call("show", f"--cache-dir={store.folder.parent}")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith(f"{store.folder}: 3 entries, 7.")
    assert [line.split()[:2] for line in lines[1:]] == [["measurements", "1"], ["state", "2"]]


def test_show_lists_entries(store: Cache) -> None:
    assert store.read("a" * 64, "state") is not None
    lines = call("show", "--entries", f"--cache-dir={store.folder.parent}").output.splitlines()
    assert sorted(line.split()[-2:] for line in lines[3:]) == [
        ["measurements", "memit"],
        ["state", "memit"],
        ["state", "memit+awq"],
    ]
    assert lines[3].split()[-2:] == ["state", "memit"]  # the last one used


def test_clear_leaves_nothing(store: Cache) -> None:
    result = call("clear", f"--cache-dir={store.folder.parent}")
    assert result.exit_code == 0
    assert "3 entries removed" in result.output
    assert "0 entries, 0 bytes" in call("show", f"--cache-dir={store.folder.parent}").output


def test_the_default_is_the_users_store(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.folder.parent.parent))
    assert f"{store.folder}: 3 entries" in call("show").output


def test_no_store_is_an_empty_one(tmp_path: Path) -> None:
    for command in ("show", "clear"):
        result = call(command, f"--cache-dir={tmp_path / 'none'}")
        assert result.exit_code == 0 and ": 0 entries" in result.output
    assert not (tmp_path / "none").exists()


def test_the_command_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lmcompose": "pytest_lmcompose.cli:main"}
