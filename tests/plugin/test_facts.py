"""What is kept of a model, so that a run of known results does not load it: when it counts, and when not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from interventions import contents
from pytest_lmcompose.build import facts
from pytest_lmcompose.build.facts import facts_address
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.settings import ModelSettings
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_cache import applied, measured, without_times
from tests.plugin.test_run import read_report

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
NO_TORCH = """
import sys
import pytest

@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    print("heavy:", sorted(sys.modules.keys() & {"torch", "transformers"}))
"""


@pytest.fixture
def cached(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a cache of its own, on a CPU."""
    project.arguments[project.arguments.index(NO_CACHE)] = "--lmcompose-cache-dir=store"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return project


def test_a_run_of_known_results_loads_no_model_and_imports_no_torch(cached: Project) -> None:
    ids = ("nudge", "nudge+round")
    cached.run("--lmcompose-json=first.json", compose=ids).assert_outcomes(passed=2)
    conftest = cached.path / "conftest.py"
    conftest.write_text(conftest.read_text() + NO_TORCH)
    again = cached.run_apart("--lmcompose-json=again.json", compose=ids)
    again.assert_outcomes(passed=2)
    again.stdout.fnmatch_lines(["heavy: [[]]"])
    one, two = (without_times(read_report(cached.path / f"{name}.json")) for name in ("first", "again"))
    assert one == two


def test_a_model_that_differs_from_its_facts_stops_the_run(cached: Project) -> None:
    cached.run(compose=("nudge",))
    store = Cache(cached.path / "store", 10**9, print)
    (entry,) = (entry for entry in store.entries() if store.about(entry)[0] == "facts")
    wrong = {**store.about(entry)[1], "address": "another"}
    store.remove(entry.folder)
    store.write(entry.folder.name, "facts", wrong, lambda folder: None)
    stopped = cached.run(compose=("nudge",))
    stopped.assert_outcomes(errors=1)
    stopped.stdout.fnmatch_lines(["*the cache had other facts of this model, which are removed now: run again"])
    again = cached.run(compose=("nudge",))
    again.assert_outcomes(passed=1)
    assert applied(again) == measured(again, ("nudge", "base")) == []


def _text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def _last_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")


@pytest.mark.parametrize(
    "change",
    [
        _last_byte,
        _text("config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0'),
        _text("generation_config.json", "{", '{"max_length": 7,'),
        _text("tokenizer.json", '"version": "1.0"', '"version":  "1.0"'),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "vocab.other").write_text("a"),
    ],
)
def test_files_that_are_read_count(tiny_model: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))

    def found() -> str | None:
        return facts_address(ModelSettings(), str(folder), "auto", None, ON_CPU)

    before = found()
    (folder / "optimizer.pt").write_bytes(b"never read")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"another model")
    assert found() == before is not None
    change(folder)
    assert found() not in (before, None)


def test_settings_the_prompt_and_versions_count(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(asked: str | None = None, **settings: object) -> str | None:
        return facts_address(ModelSettings(**settings), str(tiny_model), "auto", asked, ON_CPU)  # type: ignore[arg-type]

    addresses = [found(), found(dtype="bfloat16"), found("today"), found(device_map="host"), found(memory_budget=1)]
    real = metadata.version
    monkeypatch.setattr(
        "pytest_lmcompose.cache.address.version", lambda name: "0" if name == "sentencepiece" else real(name)
    )
    addresses.append(found())
    assert None not in addresses and len(set(addresses)) == len(addresses)


def test_what_files_do_not_determine_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(tiny_model)
    assert facts_address(ModelSettings(trust_remote_code=True), here, "cpu", None, ON_CPU) is None
    assert facts_address(ModelSettings(), here, "auto", None, {"CUDA_VISIBLE_DEVICES": "0"}) is None
    assert facts_address(ModelSettings(), here, "cuda:1", None, ON_CPU) is None
    assert facts_address(ModelSettings(), here, "cpu", None, {"CUDA_VISIBLE_DEVICES": "0"}) is not None
    assert facts_address(ModelSettings(), str(tmp_path / "absent"), "cpu", None, ON_CPU) is None
    monkeypatch.setattr(facts, "may_have_gpu", lambda environ: True)
    assert facts_address(ModelSettings(), here, "auto", None, ON_CPU) is None


def test_an_adapter_counts_with_its_base_and_a_hub_id_by_its_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: dict[tuple[str, str | None], Path] = {}
    local = contents.local_copy
    monkeypatch.setattr(
        contents, "local_copy", lambda name, revision: commits.get((name, revision)) or local(name, revision)
    )

    def snapshot(name: str, revision: str | None, commit: str) -> None:
        commits[name, revision] = Path(shutil.copytree(tiny_model, tmp_path / commit))

    snapshot("some/model", "v1", "c0ffee")
    snapshot("some/model", "v2", "decade")
    assert contents.model_content("some/model", "v1") == "c0ffee"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    found = []
    for base, revision in ((str(tiny_model), None), ("some/model", "v1"), ("some/model", "v2")):
        config = {"base_model_name_or_path": base, "revision": revision}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        found.append(contents.model_content(str(adapter), None))
    assert [text.partition(" on ")[2] for text in found[1:]] == ["c0ffee", "decade"]
    assert found[0].endswith(contents.model_content(str(tiny_model), None))
