"""Edit data as published: each set is recognised, and all its prompts are used."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from evaluators.data import Probe
from interventions.types import Edit
from pytest_lmcompose.data.readers import read_edits
from pytest_lmcompose.data.records import WorldError, select_edits

DATA = Path(__file__).parents[1] / "data"
COUNTERFACT = {
    "case_id": 0,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Elsewhere, it rained. Danielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "neighborhood_prompts": [f"Neighbour {i} is a native speaker of" for i in range(10)],
    "attribute_prompts": [f"Speaker {i} speaks" for i in range(10)],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"] * 10,
}
KNOWEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Rome",
    "ground_truth": ["Berlin", "Berlin, Germany"],
    "rephrase": "Where did Leo Arons die?",
    "portability": {
        "Logical_Generalization": [],
        "Reasoning": [{"prompt": "Leo Arons died in the country of", "ground_truth": [["Italy", "Italia"]]}],
        "Subject_Aliasing": [
            {"prompt": "Martin Leo Arons died in", "ground_truth": ["Rome"]},
            {"prompt": "M. L. Arons died in", "ground_truth": [[]]},
        ],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Leo Arons is", "ground_truth": "male"}],
        "Forgetfulness": None,
    },
}


def saved(folder: Path, *records: Any) -> Path:
    path = folder / "edits.json"
    path.write_text(json.dumps(records))
    return path


def test_counterfact_uses_all_paraphrases_and_neighbours(tmp_path: Path) -> None:
    (record,) = read_edits(saved(tmp_path, COUNTERFACT))
    assert record.edit == Edit("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English")
    assert record.paraphrases == tuple(COUNTERFACT["paraphrase_prompts"])  # type: ignore[arg-type]
    assert record.locality == tuple(Probe(f"Neighbour {i} is a native speaker of", "French") for i in range(10))
    assert record.truth == "French"


def test_knowedit_keeps_the_kinds_of_its_prompts(tmp_path: Path) -> None:
    (record,) = read_edits(saved(tmp_path, KNOWEDIT))
    assert record.edit == Edit("The place of death of Leo Arons is", "Leo Arons", "Rome")
    assert (record.paraphrases, record.truth) == (("Where did Leo Arons die?",), "Berlin")
    assert record.portability == (
        Probe("Leo Arons died in the country of", "Italy", kind="Reasoning"),
        Probe("Martin Leo Arons died in", "Rome", kind="Subject_Aliasing"),
    )
    assert record.locality == (Probe("The gender of Leo Arons is", "male", kind="Relation_Specificity"),)
    bare = {key: KNOWEDIT[key] for key in ("subject", "prompt", "target_new")} | {
        "rephrase_prompt": "Leo Arons died in"
    }
    (record,) = read_edits(saved(tmp_path, bare))
    assert (record.paraphrases, record.truth, record.portability) == (("Leo Arons died in",), "", ())


@pytest.mark.parametrize(
    ("name", "edits", "aspects"),
    [
        ("zsre_mend.json", 20, (1, 1, 0)),
        ("counterfact_easyedit.json", 20, (1, 1, 0)),
        ("mquake_cf.json", 12, (1, 1, 3)),
    ],
)
def test_published_files_are_recognised(name: str, edits: int, aspects: tuple[int, int, int]) -> None:
    records = read_edits(DATA / name)
    assert len(records) >= edits
    for record in records:
        assert record.edit.subject in record.edit.prompt and record.edit.target and record.truth
        assert len(record.paraphrases) == aspects[0]
    assert max(len(record.locality) for record in records) >= aspects[1]
    assert max(len(record.portability) for record in records) == aspects[2]
    schema = {"zsre_mend.json": "zsre", "counterfact_easyedit.json": "counterfact"}.get(name, "mquake")
    assert read_edits(DATA / name, schema) == records
    assert len(select_edits(records, 10, 0)) == 10


@pytest.mark.parametrize("rename", [{"split": "x"}, {}])
def test_what_is_not_recognised_names_the_fields_and_the_schemas(tmp_path: Path, rename: dict[str, str]) -> None:
    with pytest.raises(
        WorldError, match=r"record 1: not recognised .* it has ask.*; set world\.edits_schema to one of"
    ):
        read_edits(saved(tmp_path, {"ask": "x", **rename}))


def test_easyedits_files_with_a_portability_question(tmp_path: Path) -> None:
    flat = json.loads((DATA / "counterfact_easyedit.json").read_text())[0]
    flat |= {"portability_prompt": "The leader of NATO is", "portability_ground_truth": "Stoltenberg"}
    (record,) = read_edits(saved(tmp_path, flat))
    assert record.portability == (Probe("The leader of NATO is", "Stoltenberg"),)
    zsre = json.loads((DATA / "zsre_mend.json").read_text())[0]
    zsre["portability"] = {"Recalled Relation": "x", "New Question": "Which continent?", "New Answer": "America"}
    (record,) = read_edits(saved(tmp_path, zsre))
    assert record.portability == (Probe("Which continent?", "America"),)


def test_a_subject_in_another_case_is_spelt_as_in_its_prompt(tmp_path: Path) -> None:
    zsre = json.loads((DATA / "zsre_mend.json").read_text())[0]
    zsre["subject"] = zsre["subject"].upper()
    (record,) = read_edits(saved(tmp_path, zsre))
    assert record.edit.subject in record.edit.prompt


def test_ten_thousand_counterfact_records_take_less_than_two_seconds(tmp_path: Path) -> None:
    def case(i: int) -> dict[str, Any]:
        rewrite = {**COUNTERFACT["requested_rewrite"], "subject": f"Danielle {i}"}  # type: ignore[dict-item]
        return {**COUNTERFACT, "case_id": i, "requested_rewrite": rewrite}

    path = saved(tmp_path, *map(case, range(10_000)))
    start = time.process_time()
    assert len(read_edits(path)) == 10_000
    assert time.process_time() - start < 2
