"""Tracking on Weights & Biases, offline: what is in the run's own file afterwards."""

from __future__ import annotations

import importlib.machinery
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from pytest_lmcompose.report import wandb as tracking
from pytest_lmcompose.report.options import Tracking
from pytest_lmcompose.report.wandb import track
from pytest_lmcompose.results import decode
from tests.plugin.conftest import Project
from tests.plugin.documents import typed
from tests.plugin.rich_documents import broken_off, rich

BLOCK = 32768


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let wandb work without a network, in a folder of the test's own."""
    folder = tmp_path / "tracking"
    folder.mkdir()
    for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield folder
    wandb.teardown()  # else the next run in this process would go where this one went


def records(folder: Path) -> list[Record]:
    """Read the file of the only offline run back; W&B's own process writes it, and may still be at it."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 60
    found = read_records(path)
    while not any(record.HasField("exit") for record in found) and time.monotonic() < end:
        time.sleep(0.1)
        found = read_records(path)
    return found


def read_records(path: Path) -> list[Record]:
    """Return the records that are complete, in the framing of LevelDB's log."""
    data, place, parts, found = path.read_bytes(), 7, [], []
    while place < len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        if place + 7 > len(data):
            break
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + size > len(data):
            break
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def summary_of(found: list[Record]) -> dict[str, Any]:
    updates = (update for record in found for update in record.summary.update)
    return {update.key or "/".join(update.nested_key): json.loads(update.value_json) for update in updates}


def tables_of(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in folder.glob("wandb/offline-run-*/files/media/table/lmcompose/*.json"):
        yield path.name.partition("_")[0], json.loads(path.read_text())


def test_summary_tables_and_page_of_a_run(offline: Path) -> None:
    document = rich(("base", "memit", "awq", "memit+awq", "awq+memit", "awq[bits=2]"))
    told = track(Tracking("demo", "someone", ("nightly", "a b")), typed(document), "<p>the page</p>")
    assert "offline" in told and str(offline) in told
    found = records(offline)
    (run,) = [record.run for record in found if record.run.run_id]
    assert (run.project, run.entity, list(run.tags)) == ("demo", "someone", ["nightly", "a b"])
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["seed"] == 0 and config["recipe"]["evaluate"] == {"edits": 20}
    summary = summary_of(found)
    failed = [gate for record in document["compositions"] for gate in record["gates"] if not gate["passed"]]
    assert summary["gates_failed"] == len(failed) > 0
    assert summary["memit+awq/recall"] == document["compositions"][3]["measurements"][2]["value"]
    assert "awq[bits=2]/perplexity" not in summary  # it is not finite
    tables = dict(tables_of(offline))
    assert set(tables) == {"measurements", "gates", "steps", "orders"}
    assert len(tables["gates"]["data"]) == 12
    assert ["memit+awq", "awq"] in [row[:2] for row in tables["steps"]["data"]]
    assert {"awq & memit"} == {row[0] for row in tables["orders"]["data"]}
    artifacts = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in found if record.HasField("artifact")]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "lmcompose-report"]
    files = {entry.path: Path(entry.local_path).read_text() for entry in artifact.manifest.contents}
    assert files["report.html"] == "<p>the page</p>"
    assert decode(files["report.json"]) == typed(document)


def test_a_run_of_the_plugin_is_tracked(project: Project, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "render", lambda *_: "page")  # which takes seconds, and is not what this is about
    result = project.run("--lmcompose-wandb=demo", "--lmcompose-wandb-tags=a, b", compose=("round",))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["lmcompose: tracked offline in *"])
    found = records(offline)
    assert [list(record.run.tags) for record in found if record.run.run_id] == [["a", "b"]]
    assert summary_of(found)["gates"] == 2
    assert "round/edit_success_f1" in summary_of(found)


def test_what_goes_wrong_is_told_and_costs_nothing(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no such entity")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(tracking, "render", lambda *_: "page")
    told: list[str] = []
    tracking.Tracker(Tracking("demo"), told.append).pytest_lmcompose_report(typed(broken_off()), None)
    assert told == ["lmcompose: the run could not be tracked on Weights & Biases: CommError: no such entity"]


def test_disabled_is_told(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(RuntimeError, match="wandb is disabled: check WANDB_MODE, or log in"):
        track(Tracking("demo"), typed(broken_off()), "page")


def test_without_the_package_the_extra_is_named(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What an offline run leaves behind is a folder `wandb`, which is found like a package.
    left = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    for found in (None, left):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        error = refused("--lmcompose-wandb=demo")
        assert "--lmcompose-wandb: the package wandb is not installed" in error
        assert "pip install 'pytest-lmcompose[wandb]'" in error


@pytest.mark.parametrize("flag", ["entity=me", "tags=a"])
def test_entity_and_tags_need_a_project(refused: Callable[..., str], flag: str) -> None:
    assert f"--lmcompose-wandb-{flag.partition('=')[0]}: needs --lmcompose-wandb=PROJECT" in refused(
        f"--lmcompose-wandb-{flag}"
    )
