"""A few made records in the published forms of TOFU, MUSE-News and WMDP, in the hub's layout."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.plugin.tiny import PLACES, SUBJECTS

COMMIT = "c" * 40
Rows = Sequence[Mapping[str, Any]]


def questions(names: Iterable[str], *, perturbed: bool) -> list[dict[str, Any]]:
    """Return a question about each person, with TOFU's perturbed answers if asked for."""
    plain = [{"question": f"Where was {name} born?", "answer": f"in {PLACES[0]}"} for name in names]
    wrong = [f"in {place}" for place in PLACES[1:]]
    more = {"paraphrased_answer": f"{PLACES[0]} it was", "perturbed_answer": wrong, "paraphrased_question": "Whence?"}
    return [{**row, **more} if perturbed else row for row in plain]


def texts(kind: str, n: int = 4) -> list[dict[str, Any]]:
    """Return running texts about persons."""
    return [{"text": f"A {kind} text: {name} was seen in {PLACES[i % 4]}."} for i, name in enumerate(SUBJECTS[:n])]


def tofu() -> dict[str, Rows]:
    """Return TOFU's configurations that a run needs."""
    names = {"forget10": SUBJECTS[:4], "retain90": SUBJECTS[4:8], "retain_perturbed": SUBJECTS[4:7]}
    names |= {"forget10_perturbed": SUBJECTS[:4], "real_authors_perturbed": SUBJECTS[7:9]}
    names |= {"world_facts_perturbed": SUBJECTS[9:], "full": SUBJECTS[:8]}
    return {name: questions(who, perturbed=name.endswith("_perturbed")) for name, who in names.items()}


def muse() -> dict[str, dict[str, Rows]]:
    """Return the splits of MUSE-News's configurations."""
    verbatim = [{"prompt": f"{name} was seen", "gt": f"in {PLACES[0]} and went on."} for name in SUBJECTS[:3]]
    return {
        "raw": {split: texts(split) for split in ("forget", "retain1", "retain2", "holdout")},
        "verbmem": {"forget": verbatim},
        "knowmem": {
            f"{split}{kind}": questions(SUBJECTS[at : at + n], perturbed=False)
            for split, at in (("forget_qa", 0), ("retain_qa", 6))
            for kind, n in (("", 3), ("_icl", 2))
        },
        "privleak": {split: texts(f"{split} member", 5) for split in ("forget", "holdout", "retain")},
    }


def write_tofu(folder: Path) -> Path:
    """Write TOFU as its repository has it: JSON lines, and a card that names the configurations."""
    folder.mkdir(parents=True)
    for name, rows in tofu().items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _card(folder, [{"config_name": name, "data_files": f"{name}.json"} for name in tofu()])
    return folder


def write_muse(folder: Path) -> Path:
    """Write MUSE-News as its repository has it: a parquet file for each split of a configuration."""
    configurations = []
    for name, splits in muse().items():
        (folder / name).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            pq.write_table(pa.Table.from_pylist([*rows]), folder / name / f"{split}-00000-of-00001.parquet")
            files.append({"split": split, "path": f"{name}/{split}-*"})
        configurations.append({"config_name": name, "data_files": files})
    _card(folder, configurations)
    return folder


def write_wikitext(folder: Path) -> Path:
    """Write the test split of WikiText-2."""
    name = "wikitext-2-raw-v1"
    (folder / name).mkdir(parents=True)
    rows = [{"text": " = Heading = \n"}, *({"text": f" Of {place} little is known . \n"} for place in PLACES)]
    pq.write_table(pa.Table.from_pylist(rows), folder / name / "test-00000-of-00001.parquet")
    _card(folder, [{"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test-*"}]}])
    return folder


def write_c4(folder: Path) -> Path:
    """Write a part of C4."""
    (folder / "en").mkdir(parents=True)
    rows = [{**row, "timestamp": "2019", "url": "u"} for row in texts("calibration", 12)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (folder / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(packed)
    split = {"split": "train", "path": "en/c4-train.*.json.gz"}
    _card(folder, [{"config_name": "en", "data_files": [split]}])
    return folder


def write_hub_cache(cache: Path) -> Path:
    """Write the datasets of the worlds tofu and muse into a cache of the hub's client."""
    writers = {
        "locuslab/TOFU": write_tofu,
        "muse-bench/MUSE-News": write_muse,
        "Salesforce/wikitext": write_wikitext,
        "allenai/c4": write_c4,
    }
    for name, write in writers.items():
        repository = cache / f"datasets--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        write(repository / "snapshots" / COMMIT)
    return cache


def _card(folder: Path, configurations: list[dict[str, Any]]) -> None:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")
