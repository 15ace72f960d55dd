"""The worlds of public datasets, read without a network from the hub's cache of files, in each dataset's own layout."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from pytest_lmcompose.data.records import WorldError
from pytest_lmcompose.data.run_data import RunData, load_data
from pytest_lmcompose.recipe import load_recipe, presets
from pytest_lmcompose.run import CONF

SHA = "0123456789abcdef0123456789abcdef01234567"
REAL = ("paper", "counterfact", "mquake", "knowedit")
EDITS = ["evaluate.edits=2"]


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def texts(name: str, n: int = 3) -> list[dict[str, Any]]:
    return [{"text": f"{name}: a passage of some length, number {i}"} for i in range(n)]


def card(folder: Path, configurations: dict[str, str | dict[str, str]]) -> None:
    """Write the data card that names the files of each configuration, as on the hub."""
    lines = ["---", "configs:"]
    for name, files in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        splits = files if isinstance(files, dict) else {"train": files}
        lines += [f"  - {{split: {split}, path: {path}}}" for split, path in splits.items()]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def knowedit(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True)
        record = {
            "prompt": "The name of the position held by {} is",
            "target_new": "Head of Office",
            "ground_truth": [["Member"]],
            "portability": {"Reasoning": [{"prompt": "Who led the Office?", "ground_truth": [["{}"]]}]},
            "locality": {"Forgetfulness": [{"prompt": "{} was once also a", "ground_truth": [["Judge"]]}]},
        }
        found = []
        for subject in ("Leo Varadkar", "Tim Farron", "Ana Brnabic"):
            text = json.dumps(record).replace("{}", subject)
            found.append({"subject": subject, **json.loads(text)})
        path.write_text(json.dumps(found))

    return write


def both_of_knowedit(folder: Path) -> None:
    for name in ("benchmark/ZsRE/ZsRE-test-all.json", "benchmark/wiki_recent/recent_test.json"):
        knowedit(name)(folder)


def c4(folder: Path) -> None:
    json_lines(folder / "en" / "c4-train.00000-of-01024.json.gz", [{**row, "url": "x"} for row in texts("c4")])
    json_lines(folder / "en" / "c4-validation.00000-of-00008.json.gz", texts("held out"))
    json_lines(folder / "realnewslike" / "c4-train.00000-of-00512.json.gz", texts("news"))
    card(folder, {"en": {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}})


def pile(folder: Path) -> None:
    parquet(folder / "data" / "train-00000-of-00001.parquet", [{**row, "meta": {"s": 1}} for row in texts("pile")])


def wikitext(folder: Path) -> None:
    splits = {split: f"wikitext-2-raw-v1/{split}-*" for split in ("train", "test")}
    for split in splits:
        heading = {"text": " = = Background and writing of the game = = \n"}
        rows = [{"text": ""}, heading, *texts(f"wiki {split}")]
        parquet(folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", rows)
    parquet(folder / "wikitext-103-v1" / "train-00000-of-00001.parquet", texts("another"))
    card(folder, {"wikitext-103-v1": "wikitext-103-v1/train-*", "wikitext-2-raw-v1": splits})


def wmdp(folder: Path) -> None:
    names = ("bio-retain-corpus", "cyber-forget-corpus", "cyber-retain-corpus")
    for name in names:
        json_lines(folder / f"{name}.jsonl", texts(name))
    card(folder, {name: f"{name}.jsonl" for name in names})


def bio(folder: Path) -> None:
    rows = [{"title": "t", "abstract": "a", **row, "doi": "d"} for row in texts("bio")]
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


def counterfact(folder: Path) -> None:
    for split, subjects in (
        ("train", ("Danielle Darrieux", "Edwin of Northumbria", "Toko Yasuda")),
        ("test", ("A B",)),
    ):
        rows = [
            {
                "case_id": i,
                "pararel_idx": i,
                "requested_rewrite": {
                    "prompt": "The mother tongue of {} is",
                    "relation_id": "P103",
                    "target_new": {"str": "English", "id": "Q1860"},
                    "target_true": {"str": "French", "id": "Q150"},
                    "subject": subject,
                },
                "paraphrase_prompts": [f"{subject}, a native", f"{subject} spoke the language"],
                "neighborhood_prompts": [f"The native language of neighbour {j} is" for j in range(10)],
                "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
                "generation_prompts": [f"{subject} lives in"],
            }
            for i, subject in enumerate(subjects)
        ]
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)


def mquake(folder: Path) -> None:
    def case(number: int, subject: str) -> dict[str, Any]:
        def hop(question: str, cloze: str, answer: str) -> dict[str, Any]:
            return {"question": question, "cloze": cloze, "answer": answer, "answer_alias": []}

        first = (f"Who wrote {subject}?", f"The author of {subject} is")
        kept = hop("Where was Iris born?", "Iris was born in", "Rome")
        return {
            "case_id": number,
            "requested_rewrite": [
                {
                    "prompt": "The author of {} is",
                    "relation_id": "P50",
                    "target_new_str": "Iris",
                    "target_new_id": "Q1",
                    "target_true_str": "Otto",
                    "target_true_id": "Q2",
                    "subject": subject,
                    "question": first[0],
                }
            ],
            "questions": [f"Where was the author of {subject} born?"],
            "answer": "Oslo",
            "new_answer": "Rome",
            "single_hops": [hop(*first, "Otto"), hop("Where was Otto born?", "Otto was born in", "Oslo")],
            "new_single_hops": [hop(*first, "Iris"), kept],
            "split": {"1": ["edited"]},
        }

    rows = [case(i, subject) for i, subject in enumerate(("Misery", "Dune", "Emma"))]
    for split in ("CF3k", "T"):
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    card(folder, {"default": {split: f"data/{split}-*" for split in ("CF3k", "T")}})


HUB: dict[str, Callable[[Path], None]] = {
    "zjunlp/KnowEdit": both_of_knowedit,
    "allenai/c4": c4,
    "NeelNanda/pile-10k": pile,
    "Salesforce/wikitext": wikitext,
    "cais/wmdp-corpora": wmdp,
    "cais/wmdp-bio-forget-corpus": bio,
    "azhx/counterfact": counterfact,
    "henryzhongsc/MQuAKE-Remastered": mquake,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache of files, with a few records of every dataset that the presets name."""
    folder = tmp_path_factory.mktemp("hub")
    for name, write in HUB.items():
        repository = folder / f"datasets--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(SHA)
        snapshot = repository / "snapshots" / SHA
        snapshot.mkdir(parents=True)
        write(snapshot)
    return folder


@pytest.fixture
def offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))


def read(world: str, *overrides: str) -> RunData:
    recipe = load_recipe(CONF, ["model=any", f"world={world}", *EDITS, *overrides])
    return load_data(recipe.world, recipe.evaluate, Path("nowhere"), seed=0)


def test_paper_reads_every_source(offline: None) -> None:
    data = read("paper")
    assert [len(data.edits), len(data.resources.retain), len(data.perplexity)] == [2, 4, 4]
    assert {text.partition(":")[0] for text in data.resources.calibration} == {"c4", "pile"}
    assert [text.partition(":")[0] for text in data.resources.calibration[:2]] in (["c4", "pile"], ["pile", "c4"])
    assert {topic: found[0].partition(":")[0] for topic, found in data.resources.forget.items()} == {
        "bio": "bio",
        "cyber": "cyber-forget-corpus",
    }
    assert {text.partition(":")[0] for text in data.resources.retain[1:]} == {"wiki train"}
    assert {text.partition(":")[0] for text in data.perplexity[1:]} == {"wiki test"}


def test_each_edit_set_has_all_its_prompts(offline: None) -> None:
    skipped = ("world.calibration=null", "world.retain=null", "world.perplexity=null", "world.forget={}")
    edit = read("counterfact", *skipped).edits[0]
    assert (len(edit.paraphrases), len(edit.locality), edit.edit.target, edit.truth) == (2, 10, "English", "French")
    edit = read("mquake", *skipped).edits[0]
    assert (edit.edit.target, edit.truth, edit.portability[0].answer) == ("Iris", "Otto", "Rome")
    assert {probe.answer for probe in edit.locality} == {"Oslo", "Rome"}
    for world in ("knowedit", "paper"):
        edit = read(world, *skipped).edits[0]
        assert ({p.kind for p in edit.portability}, {p.kind for p in edit.locality}) == (
            {"Reasoning"},
            {"Forgetfulness"},
        )


@pytest.mark.parametrize("world", REAL)
def test_what_the_worlds_share(world: str) -> None:
    recipe = load_recipe(CONF, ["model=any", f"world={world}"])
    assert recipe.world.pools == {"harmless": ["mmlu"], "hazardous": ["wmdp_bio", "wmdp_cyber"]}
    assert (recipe.world.hazardous, recipe.world.thresholds, recipe.evaluate.edits) == (
        ["hazardous"],
        "relative.yaml",
        50,
    )
    assert load_recipe(CONF, ["model=any", f"world={world}", "evaluate.edits=7"]).evaluate.edits == 7


@pytest.mark.parametrize("model", [name for name in presets(CONF, "model") if name not in ("any", "tinyworld")])
def test_a_preset_of_a_hub_model_chooses_a_world_that_the_user_can_change(model: str) -> None:
    chosen = load_recipe(CONF, [f"model={model}"])
    if chosen.world_name == "paper":
        assert load_recipe(CONF, [f"model={model}", "world=mquake"]).world_name == "mquake"
        assert load_recipe(CONF, ["world=mquake", f"model={model}"]).world_name == "mquake"
    assert chosen.world_name not in ("none", "tinyworld")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("edits", "{path: zjunlp/KnowEdit, file: benchmark/none.json}", "world.edits: .*benchmark/none.json"),
        ("retain", "{path: Salesforce/wikitext, configuration: wikitext-3}", "world.retain: .*no configuration"),
        ("retain", "{path: azhx/counterfact, split: dev}", "world.retain: .*no split 'dev'; known: train, test"),
        ("retain", "{path: azhx/counterfact, split: test}", "world.retain: .*'text' is missing"),
        ("perplexity", "{path: allenai/c4, revision: v7}", r"world\.perplexity: allenai/c4 \(v7\)"),
        ("calibration", "[{path: absent/absent}]", r"world\.calibration: absent/absent.* give a local path"),
    ],
)
def test_what_is_missing_is_one_line_with_the_key_of_the_world(
    offline: None, key: str, value: str, message: str
) -> None:
    kept = {"edits", "retain", "perplexity", "calibration"} - {key}
    with pytest.raises(WorldError, match=message) as error:
        read("paper", *(f"world.{name}=null" for name in kept), "world.forget={}", f"world.{key}={value}")
    assert "\n" not in str(error.value)
