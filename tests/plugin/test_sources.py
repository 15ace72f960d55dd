"""Where the data of a world comes from: files of every kind, folders in the hub's layout, and the hub."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from interventions.ranges import SettingError
from pytest_lmcompose.cache.address import data_address
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import WorldError
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.data.source import Source, parse_source
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

FACTS = [
    {"subject": "Ada", "prompt": "Ada lives in", "answer": "Lome, by\u2028the sea", "relation": "lives"},
    {"subject": "Bru", "prompt": 'Bru "B" lives in', "answer": "Köln", "relation": "lives"},
]
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
  - {split: test, path: small/test-*}
- config_name: large
  data_files: large/*
---
"""
Rows = Sequence[dict[str, Any]]


def _json_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _table(delimiter: str) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    return write


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)) and None,
    "data.json": lambda path, rows: path.write_text(json.dumps({"data": rows})) and None,
    "lines.json": _json_lines,
    "jsonl": _json_lines,
    "csv": _table(","),
    "tsv": _table("\t"),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(list(rows)), path),
}


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _json_lines(path, [{"text": text} for text in texts])
    return path


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A folder as the hub has them, with two configurations, the first of two splits."""
    folder = tmp_path / "org" / "name"
    for split in ("train", "test"):
        write_texts(folder / f"small/{split}-00000-of-00001.jsonl", [f"{split} {i}" for i in range(6)])
    write_texts(folder / "large/part.jsonl", ["one", "two"])
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / f"facts.{kind}"
    WRITERS[kind](path, FACTS)
    if zipped:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    found = [{key: getattr(fact, key) for key in FACTS[0]} for fact in read_facts(path.name, tmp_path)]
    assert found == FACTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_byte_order_marks_and_crlf_are_no_part_of_the_data(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / f"facts.{kind}"
    WRITERS[kind](path, FACTS[1:])
    text = path.read_text().replace("\r\n", "\n").replace("\n", "\r\n")
    path.write_bytes(text.encode(encoding))
    assert [(fact.subject, fact.answer) for fact in read_facts(path)] == [("Bru", "Köln")]


def test_each_line_of_a_text_file_is_a_text_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes("\ufeff = Title = \r\n\r\nTwo.\r\n".encode())
    assert read_texts(path) == (" = Title = ", "Two.")
    path.write_text("\n \n")
    with pytest.raises(WorldError, match="every text is blank"):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "expected a list with at least one record"),
        ("a.json", b'[{"text": 1]', "line 1: not JSON"),
        ("a.jsonl", b"\xff{}", "cannot be read: 'utf-8' codec"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], "cannot be read: Compressed file ended"),
        ("a.csv", b"text,b\nx,y\nz\n", "record 2: not as many cells"),
        ("a.csv", b'text\n"x\n', "not readable as a table: unexpected end of data"),
        ("a.parquet", b"PAR1 and no more", "not a parquet file"),
        ("a.docx", b"", "unknown kind of file; expected .json, .jsonl"),
        ("a.jsonl", b'{"body": "x"}\n', "record 1: field 'text' is missing; it has body"),
    ],
)
def test_broken_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WorldError, match=message) as error:
        read_texts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_field_filter_limit_and_seed(tmp_path: Path) -> None:
    rows = [{"body": {"en": f"text {i}"}, "topic": "odd" if i % 2 else "even", "year": i} for i in range(20)]
    WRITERS["jsonl"](tmp_path / "a.jsonl", rows)
    odd = {"path": "a.jsonl", "field": "body.en", "filter": {"topic": "odd"}}
    assert read_texts({**odd, "limit": 2}, tmp_path) == ("text 1", "text 3")
    years = {"path": "a.jsonl", "field": "body.en", "filter": {"topic": ["odd"], "year": [3, "4", 5]}}
    assert read_texts(years, tmp_path) == ("text 3", "text 5")
    sampled = read_texts({**odd, "limit": 4, "seed": 1}, tmp_path)
    assert len(sampled) == 4 and sampled == read_texts({**odd, "limit": 4, "seed": 1}, tmp_path)
    assert len({read_texts({**odd, "limit": 4, "seed": seed}, tmp_path) for seed in range(5)}) > 1
    assert set(read_texts({**odd, "limit": 99, "seed": 1}, tmp_path)) == {f"text {i}" for i in range(1, 20, 2)}
    with pytest.raises(WorldError, match=r"no records with \{'topic': 'none'\}"):
        read_texts({**odd, "filter": {"topic": "none"}}, tmp_path)
    with pytest.raises(WorldError, match=r"a\.jsonl, record 1: field 'kind' is missing; it has body, topic, year"):
        read_texts({**odd, "filter": {"kind": "x"}}, tmp_path)


def test_fields_of_other_names(tmp_path: Path) -> None:
    WRITERS["csv"](tmp_path / "qa.csv", [{"who": "Ada", "question": "Where?", "reply": "Lome", "kind": "lives"}])
    fields = {"subject": "who", "prompt": "question", "answer": "reply", "relation": "kind"}
    (fact,) = read_facts({"path": "qa.csv", "fields": fields}, tmp_path)
    assert (fact.subject, fact.prompt, fact.answer, fact.relation) == ("Ada", "Where?", "Lome", "lives")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b?configuration=en&split=train%2Btest&limit=3", Source("a/b", "en", "train+test", limit=3)),
        ("a/b?split=train+test[:5]&field=x y", Source("a/b", split="train+test[:5]", field="x y")),
        ("hf://datasets/a/b@v1?split=test", Source("a/b", split="test", revision="v1")),
        ({"path": "a/b", "limit": 2, "seed": 0}, Source("a/b", limit=2, seed=0)),
    ],
)
def test_sources_as_text_and_mapping(text: Any, expected: Source) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"path": "a", "splitt": "x"}, r"retain=.*unknown key 'splitt'\. Did you mean split"),
        ("a?spilt=x", r"retain=.*unknown key 'spilt'\. Did you mean split"),
        ("a?limit=many", "retain.limit=many: expected a whole number"),
        ({"path": "a", "seed": 3}, "retain.seed=3: needs a limit"),
        ({"split": "test"}, "retain=.*with the key path"),
        (7, "retain=7: expected a file"),
    ],
)
def test_sources_that_cannot_be(value: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        WorldSettings(retain=value)


def test_a_folder_in_the_hubs_layout(layout: Path) -> None:
    world = layout.parent.parent
    small = {"path": "org/name", "configuration": "small"}
    assert read_texts({**small, "split": "test"}, world)[:2] == ("test 0", "test 1")
    assert read_texts("org/name?configuration=small&split=train[:2]", world) == ("train 0", "train 1")
    assert len(read_texts("org/name?configuration=small&split=train+test", world)) == 12
    assert read_texts({"path": "org/name", "configuration": "large"}, world) == ("one", "two")
    assert read_texts({"path": "org/name", "file": "large/part.jsonl"}, world) == ("one", "two")
    drawn = {**small, "split": "test", "limit": 3, "seed": 5}
    assert len(set(read_texts(drawn, world))) == 3 and read_texts(drawn, world) == read_texts(drawn, world)
    (layout / "README.md").unlink()  # then a configuration is a subfolder
    assert read_texts({**small, "split": "test"}, world)[0] == "test 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configuration": "small", "split": "valid"}, "no split 'valid'; known: train, test"),
        ({"configuration": "small", "split": "valid[:3]"}, "valid"),
        ({"configuration": "small"}, "choose a split, one of train, test"),
        ({"configuration": "tiny", "split": "test"}, "no configuration 'tiny'; known: small, large"),
        ({"split": "test"}, "Config name is missing"),
        (
            {"configuration": "small", "split": "test", "field": "body"},
            "record 1: field 'body' is missing; it has text",
        ),
        ({"file": "small/other.jsonl"}, r"no such data file: .*other\.jsonl"),
        ({"path": "org/name/large/part.jsonl", "file": "x.jsonl"}, r"is a file, and has no file 'x\.jsonl'"),
        ({"file": "large/part.jsonl", "split": "test"}, "a single file has no split 'test'; leave out split"),
    ],
)
def test_what_is_missing_in_a_folder_is_one_line(layout: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(WorldError, match=message) as error:
        read_texts({"path": "org/name", **options}, layout.parent.parent)
    assert "name" in str(error.value) and "\n" not in str(error.value)


def test_a_changed_file_of_a_folder_is_read_again(layout: Path) -> None:
    """The library's own cache goes by a file's time of change."""
    file = layout / "small/test-00000-of-00001.jsonl"
    addresses = set()
    for word in ("test", "tost"):
        file.write_text(file.read_text().replace("test", word))
        os.utime(file, (1e9, 1e9))
        world = WorldSettings(perplexity={"path": str(layout), "configuration": "small", "split": "test[:2]"})
        data = load_data(world, EvaluateSettings(), layout, 0)
        assert data.perplexity == (f"{word} 0", f"{word} 1")
        addresses.add(data_address(data, ""))
    assert len(addresses) == 2


class Hub:
    """A hub that answers with an error, or not at all."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def dataset_info(self, *args: Any, **options: Any) -> None:
        if self.error is not None:
            raise self.error


def hub_says(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(error))


def refusal(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("404",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route"), r"cannot be reached \(no route\); give a local path, or set HF_HOME"),
        (refusal(RepositoryNotFoundError), "no such dataset on the hub"),
        (refusal(RevisionNotFoundError), "no revision 'v9' of this dataset on the hub"),
    ],
)
@pytest.mark.parametrize("file", [None, "a.json"])
def test_the_hubs_refusals_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, file: str | None
) -> None:
    hub_says(monkeypatch, error)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(WorldError, match=message) as found:
        read_texts({"path": "org/name", "split": "test", "revision": "v9", "file": file}, tmp_path)
    assert "org/name" in str(found.value) and "\n" not in str(found.value)


def test_a_missing_file_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, AssertionError("asked"))
    for name in ("a.jsonl", "b/c.csv.gz", "d.TXT"):
        with pytest.raises(WorldError, match="no such data file"):
            read_texts(name, tmp_path)
    with pytest.raises(WorldError, match="no such data file or folder: /nowhere/at/all"):
        read_texts("/nowhere/at/all", tmp_path)


def test_without_the_hub_its_caches_are_read(layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, OSError("no route"))
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "none"))
    sha, repository = "a" * 40, cache / "datasets--far--away"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(sha)
    (repository / "snapshots").mkdir()
    layout.rename(repository / "snapshots" / sha)
    assert read_texts("far/away?configuration=small&split=test&limit=1", tmp_path) == ("test 0",)
    assert read_texts("far/away?file=large/part.jsonl", tmp_path) == ("one", "two")
    assert not datasets.config.HF_HUB_OFFLINE


def prepared(layout: Path, folder: Path, commit: str) -> Path:
    """Return a cache as `datasets` leaves it after it prepared far/away from the hub."""
    made = datasets.load_dataset(str(layout), "small", cache_dir=str(folder / "made"))
    files = Path(made["test"].cache_files[0]["filename"]).parent
    there = folder / "cache" / "far___away" / "small" / "0.0.0" / commit
    there.mkdir(parents=True)
    for file in files.iterdir():
        (there / file.name.replace("name-", "away-")).write_bytes(file.read_bytes())
    info = there / "dataset_info.json"
    info.write_text(info.read_text().replace('"dataset_name": "name"', '"dataset_name": "away"'))
    return folder / "cache"


def test_without_the_hub_the_cache_of_datasets_is_read(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "b" * 40
    cache = prepared(layout, tmp_path, commit)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    hub_says(monkeypatch, OSError("no route"))
    small = {"path": "far/away", "configuration": "small"}
    assert read_texts({**small, "split": "test", "limit": 2}, tmp_path) == ("test 0", "test 1")
    assert read_texts({**small, "split": "test[:1]", "revision": commit}, tmp_path) == ("test 0",)
    for change, message in (
        ({"split": "valid"}, "no split 'valid'; known: train, test"),
        ({"split": "test", "revision": "c" * 40}, "cannot be reached"),
        ({"split": "test", "configuration": "tiny"}, "cannot be reached"),
    ):
        with pytest.raises(WorldError, match=message):
            read_texts({**small, **change}, tmp_path)


def test_every_key_of_a_world_takes_a_source(tmp_path: Path, layout: Path) -> None:
    small = {"path": str(layout), "configuration": "small"}
    WRITERS["csv"](tmp_path / "facts.csv", FACTS)
    WRITERS["tsv"](
        tmp_path / "edits.tsv",
        [
            {
                "subject": "Cil",
                "src": "Cil lives in",
                "rephrase": "The home of Cil is",
                "alt": "Lome",
                "answers": "Karth",
                "loc": "nq question: who",
                "loc_ans": "Dov",
            }
        ],
    )
    world = WorldSettings(
        edits="edits.tsv",
        facts={"path": "facts.csv", "limit": 1},
        calibration={**small, "split": "train", "limit": 2},
        retain={**small, "split": "train", "limit": 1},
        forget={"few": {"path": str(layout), "configuration": "large"}},
        perplexity={**small, "split": "test"},
    )
    data = load_data(world, EvaluateSettings(edits=1), tmp_path, 0)
    assert data.edits[0].truth == "Karth" and data.resources.forget == {"few": ("one", "two")}
    assert [fact.subject for fact in data.facts] == ["Ada"]
    assert (data.resources.calibration, data.resources.retain) == (("train 0", "train 1"), ("train 0",))
    assert len(data.perplexity) == 6


def test_headings_may_stand_in_the_text_of_methods_and_of_perplexity(tmp_path: Path) -> None:
    """As in the splits of WikiText."""
    write_texts(tmp_path / "train.jsonl", [" = = Critical reception = = \n", "It was seen by five people .\n"])
    write_texts(tmp_path / "test.jsonl", [" = = Critical reception = = \n", "It was seen by six people .\n"])
    world = WorldSettings(retain="train.jsonl", perplexity="test.jsonl")
    assert len(load_data(world, EvaluateSettings(), tmp_path, 0).perplexity) == 2
    with pytest.raises(WorldError, match="1 of the retain texts are perplexity texts too"):
        load_data(WorldSettings(retain="train.jsonl", perplexity="train.jsonl"), EvaluateSettings(), tmp_path, 0)


@pytest.mark.parametrize("key", ["edits", "facts", "calibration", "retain", "perplexity"])
def test_errors_name_the_key_of_the_world(tmp_path: Path, key: str) -> None:
    with pytest.raises(WorldError, match=rf"^world\.{key}: no such data file: .*none\.jsonl"):
        load_data(WorldSettings(**{key: "none.jsonl"}), EvaluateSettings(), tmp_path, 0)
    with pytest.raises(WorldError, match=r"^world\.forget\.a: no such data file"):
        load_data(WorldSettings(forget={"a": "none.jsonl"}), EvaluateSettings(), tmp_path, 0)


def test_edits_of_a_parquet_file_of_the_hub(tmp_path: Path) -> None:
    """Nested columns, as a dataset of the hub has them."""
    record = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "{} speaks",
            "subject": "Ada",
            "target_new": {"id": "Q1", "str": "English"},
            "target_true": {"id": "Q2", "str": "French"},
        },
        "paraphrase_prompts": ["Ada talks in"],
        "neighborhood_prompts": ["Bru speaks", "Cil speaks"],
    }
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS["parquet"](folder / "train-00000-of-00001.parquet", [record])
    (edit,) = read_edits(str(tmp_path))
    assert edit.edit.prompt == "Ada speaks" and len(edit.locality) == 2
