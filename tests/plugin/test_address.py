"""Content addresses: whatever could change a result changes its address."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from interventions.edit.memit import MemitSettings
from interventions.registry import Method, methods
from interventions.types import Edit, Resources
from pytest_lmcompose.cache.address import address, hash_files, method_code, read_module, source_hash, versions

ROOT = Path(__file__).parents[2]


def test_an_address_tells_values_and_types_apart() -> None:
    edit = Edit("Ada was born in", "Ada", "Karth")
    parts = [
        {"a": 1},
        {"a": "1"},
        {"a": 1.5},
        {"a": None},
        {"a": [1]},
        {"b": 1},
        {"a": {"b": 1}},
        {"a": {1: 1}},
        {"a": {"1": 1}},
        {"a": float("nan")},
        {"a": Resources()},
        {"a": Resources(edits=(edit,))},
        {"a": Resources(calibration=("text",))},
        {"a": Resources(retain=("text",))},
        {"a": Resources(forget={"d": ("text",)})},
        {"a": Resources(forget={"e": ("text",)})},
    ]
    assert len({address(**part) for part in parts}) == len(parts)
    assert address(a=1, b=[2]) == address(b=(2,), a=1)
    with pytest.raises(TypeError, match="Path cannot be part of a content address"):
        address(a=Path("x"))


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "deep" / "b.jsonl").write_text("two")
    seen = [hash_files([tmp_path])]
    (tmp_path / "deep" / "b.jsonl").write_text("twO")
    seen.append(hash_files([tmp_path]))
    (tmp_path / "deep" / "c.jsonl").write_text("")
    seen.append(hash_files([tmp_path]))
    (tmp_path / "deep" / "c.jsonl").rename(tmp_path / "deep" / "d.jsonl")
    seen.append(hash_files([tmp_path]))
    seen.append(hash_files([tmp_path / "a.jsonl"]))
    seen.append(hash_files([tmp_path / "missing"]))
    assert len(set(seen)) == len(seen)
    before = hash_files([tmp_path])
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("compiled")
    (tmp_path / ".a.jsonl.lock").write_text("")
    assert hash_files([tmp_path]) == before


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `sample` with a method that imports what it needs in every way there is."""
    folder = tmp_path / "sample"
    (folder / "kernels").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "kernels" / "__init__.py").write_text("")
    (folder / "method.py").write_text(
        "import json, sample.direct\nfrom sample import named\nfrom .kernels import solve\n"
        "def run():\n    from sample.late import late\n"
    )
    for name in ("direct", "named", "late", "other"):
        (folder / f"{name}.py").write_text("x = 1\n")
    (folder / "kernels" / "solve.py").write_text("from ..deep import y\n")
    (folder / "deep.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "sample"]:
        del sys.modules[name]


def fresh(*modules: str) -> str:
    read_module.cache_clear()
    return source_hash(modules)


def test_source_counts_with_all_that_it_imports(package: Path) -> None:
    before = fresh("sample.method")
    assert fresh("sample.method") == before
    for name in ("method", "__init__", "direct", "named", "late", "kernels/__init__", "kernels/solve", "deep"):
        file = package / f"{name}.py"
        text = file.read_text()
        file.write_text(text + "# changed\n")
        assert fresh("sample.method") != before, name
        file.write_text(text)
    (package / "other.py").write_text("x = 2\n")
    assert fresh("sample.method") == before
    assert not any(name.startswith("sample") for name in sys.modules)  # read, not run


def test_a_method_without_source_is_not_found_by_another_process() -> None:
    code = "from pytest_lmcompose.cache.address import source_hash; print(source_hash(('nowhere.at.all',)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert len(other.stdout.strip()) == 64
    assert fresh("nowhere.at.all") == fresh("nowhere.at.all") != other.stdout.strip()


def test_every_method_has_a_code_version_which_counts_what_it_runs() -> None:
    codes = {method.name: method_code(method) for method in methods().values()}
    assert all(len(code) == 64 for code in codes.values())
    assert codes["memit"] != codes["awq"]
    moved = Method("memit", "edit", MemitSettings, "interventions.edit.rome:run")
    assert method_code(moved) != codes["memit"]


def test_versions_of_libraries_that_are_not_there() -> None:
    found = versions(["torch", "no-such-library"])
    assert found["torch"] and found["no-such-library"] == ""
