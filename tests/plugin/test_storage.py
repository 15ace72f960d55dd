"""Stored runs: numbered files, found again by name, number or path."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.baseline.git import changes, commit
from pytest_lmcompose.baseline.storage import Storage, StorageError, passed, read_run
from tests.plugin.documents import gate, report, typed

RUN = {"a": {"recall": [1.0, 0.0, 0.5]}}


def stored(*, ok: bool = True) -> dict[str, Any]:
    about = {"name": "x", "how": "save", "passed": ok, "commit": None, "dirty": False}
    return report(RUN, stored=about)


def test_runs_are_numbered_and_found_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "runs")
    assert (storage.runs(), storage.latest()) == ([], (None, []))
    names = [storage.save(typed(report(RUN)), name).name for name in ("v1", "v2.0", "v1")]
    assert names == ["0001_v1.json", "0002_v2.0.json", "0003_v1.json"]
    for key, name in (
        ("v1", "0003_v1.json"),
        ("1", "0001_v1.json"),
        ("0002", "0002_v2.0.json"),
        ("0002_v2.0", "0002_v2.0.json"),
        ("0001_v1.json", "0001_v1.json"),
        (str(storage.folder / "0001_v1.json"), "0001_v1.json"),
    ):
        assert storage.find(key).name == name
    (tmp_path / "other.json").write_text("{}")
    assert storage.find("other.json", tmp_path) == tmp_path / "other.json"
    assert read_run(storage.find("v1")) == typed(report(RUN))


def test_a_run_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(StorageError, match="Nothing is stored there yet"):
        storage.find("v1")
    storage.save(typed(report(RUN)), "release-1")
    with pytest.raises(StorageError, match=r"Did you mean release-1\? Stored are: 0001_release-1"):
        storage.find("relaese-1")


def test_runs_that_failed_are_passed_over(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    good = storage.save(typed(stored()), "a")
    storage.save(typed(stored(ok=False)), "a")
    path, failed = storage.latest()
    assert (path, [str(run) for run in failed]) == (good, ["0002_a"])


def test_a_report_that_was_never_stored_passed_if_its_gates_did() -> None:
    failure = gate("m", passed=False)
    assert passed(typed(report(RUN)))
    assert not passed(typed(report(RUN, status="interrupted")))
    failed = report(RUN)
    failed["compositions"][0]["gates"] = [failure]
    assert not passed(typed(failed))
    failed["compositions"][0] |= {"gates": [], "status": "failed"}
    assert not passed(typed(failed))


def test_samples_are_stored_compactly_and_exactly(tmp_path: Path) -> None:
    samples = [1.0, 0.0, 1 / 3, 1e-300, 12345678.9]
    path = Storage(tmp_path).save(typed(report({"a": {"m": samples}})), "x")
    assert '"samples":[1,0,0.3333333333333333,1e-300,12345678.9]' in path.read_text()
    assert read_run(path).compositions[0].measurements[0].samples == tuple(samples)


def test_runs_stored_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    threads = [threading.Thread(target=Storage(tmp_path).save, args=(report(RUN), f"n{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.number for run in Storage(tmp_path).runs()] == list(range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(report(RUN))[:-40], "is broken or truncated: .*; store it again, or compare with another run"),
        ("", "is broken or truncated"),
        ("[]", "is not a pytest-lmcompose report"),
        ("{}", "is not a pytest-lmcompose report"),
        (
            json.dumps(report(RUN, schema_version=2)),
            "schema 2, but this version reads schema 1; install",
        ),
        (json.dumps(report(RUN, schema_version="x")), "schema 'x', .* store it again"),
        (json.dumps({"schema_version": 1}), "is damaged: Object missing required field `status`"),
        (
            json.dumps(report(RUN, compositions=None)),
            r"Expected `array`, got `null` - at `\$.compositions`",
        ),
        (
            json.dumps(report(RUN, compositions=[{}])),
            r"required field `id` - at `\$.compositions\[0\]`",
        ),
        (json.dumps(report(RUN, environment={})), "is damaged: .* at `\\$.environment`"),
        (json.dumps(report(RUN, model=[])), "is damaged: .* at `\\$.model`"),
    ],
)
def test_broken_files_are_named_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "0001_v1.json"
    path.write_text(text)
    with pytest.raises(StorageError, match=message) as error:
        read_run(path)
    assert str(path) in str(error.value)


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    document = report(RUN)
    del document["compositions"][0]["measurements"][0]["samples"]
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(StorageError, match=r"field `samples` - at `\$.compositions\[0\].measurements\[0\]`"):
        read_run(tmp_path / "x.json")


def test_no_repository_is_not_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (commit(tmp_path), changes(tmp_path, tmp_path / ".lmcompose")) == (None, [])
    monkeypatch.setenv("PATH", "")
    assert (commit(tmp_path), changes(tmp_path, tmp_path / ".lmcompose")) == (None, [])
