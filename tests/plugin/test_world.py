"""Reading the real data schemas, and choosing edits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluators.data import EditCase, Probe
from interventions.ranges import SettingError
from interventions.types import Edit
from pytest_lmcompose.data import readers
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import (
    WorldError,
    mentions,
    select_edits,
)
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.plugin.tiny import copy_with_hazardous_facts, zsre_records

COUNTERFACT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "ground_truth": "French",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "rephrase_prompt": "Danielle Darrieux speaks",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} was created in the country of",
            "subject": "basketball",
            "question": "Which country was basketball created in?",
            "target_true": {"str": "United States of America"},
            "target_new": {"str": "Canada"},
        }
    ],
    "questions": ["..."],
    "answer": "x",
    "new_answer": "y",
    "single_hops": [
        {"question": "q1", "cloze": "Kim plays the sport of", "answer": "basketball"},
        {
            "question": "q2",
            "cloze": "basketball was created in the country of",
            "answer": "United States of America",
        },
    ],
    "new_single_hops": [
        {"question": "q1", "cloze": "Kim plays the sport of", "answer": "basketball"},
        {"question": "q2", "cloze": "basketball was created in the country of", "answer": "Canada"},
    ],
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(records: Any) -> Path:
        path = tmp_path / "edits.json"
        path.write_text(json.dumps(records))
        return path

    return save


def test_zsre(saved: Callable[[Any], Path]) -> None:
    record = read_edits(saved(zsre_records()), "zsre")[0]
    assert record.edit == Edit("Ada Quill was born in", "Ada Quill", "Lome")
    assert record.paraphrases == ("The birthplace of Ada Quill is",)
    assert record.locality == (Probe("Ada Rusk lives in", "Mirel"),)
    assert record.truth == "Karth"


def test_zsre_keeps_the_question_prefix_on_request(saved: Callable[[Any], Path]) -> None:
    record = read_edits(saved(zsre_records()), "zsre", strip_nq=False)[0]
    assert record.locality[0].prompt == "nq question: Ada Rusk lives in"


def test_zsre_leaves_out_records_without_a_new_target(saved: Callable[[Any], Path]) -> None:
    records = zsre_records()
    records[1]["alt"] = ""
    subjects = [r.edit.subject for r in read_edits(saved(records), "zsre")]
    assert subjects == [r["subject"] for r in records if r["alt"]]


def test_counterfact(saved: Callable[[Any], Path]) -> None:
    (record,) = read_edits(saved([COUNTERFACT]), "counterfact")
    assert record.edit == Edit(COUNTERFACT["prompt"], "Danielle Darrieux", "English")  # type: ignore[arg-type]
    assert record.locality == (Probe("Michel Rocard is a native speaker of", "French"),)


def test_mquake_judges_locality_on_the_hops_that_stay(saved: Callable[[Any], Path]) -> None:
    (record,) = read_edits(saved([MQUAKE]), "mquake")
    assert record.edit == Edit("basketball was created in the country of", "basketball", "Canada")
    assert record.paraphrases == ("Which country was basketball created in?",)
    assert record.locality == (Probe("Kim plays the sport of", "basketball"),)


def test_mquake_asks_for_what_follows(saved: Callable[[Any], Path]) -> None:
    record = read_edits(saved([MQUAKE]), "mquake", ask_as="Q: {} A:")[0]
    assert record.portability == (Probe("...", "y", "x"),)
    assert record.paraphrases == ("Q: Which country was basketball created in? A:",)
    assert record.truth == "United States of America"


def test_mquake_cases_of_several_rewrites_are_edits_without_multi_hop_questions(saved: Callable[[Any], Path]) -> None:
    case = json.loads(json.dumps(MQUAKE))
    second = {
        "prompt": "{} plays the sport of",
        "subject": "Kim",
        "question": "q1",
        "target_true": {"str": "basketball"},
        "target_new": {"str": "chess"},
    }
    case["requested_rewrite"].append(second)
    records = read_edits(saved([case]), "mquake")
    assert [r.edit.subject for r in records] == ["basketball", "Kim"]
    assert all(r.portability == () and r.locality == () for r in records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "record 1: field 'questions' has no question"),
        ({"new_answer": ""}, "record 1: field 'new_answer' is empty"),
        ({"answer": None}, "record 1: field 'answer' is NoneType, expected text"),
    ],
)
def test_broken_multi_hop_questions_are_named(
    saved: Callable[[Any], Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(WorldError, match=message):
        read_edits(saved([MQUAKE | change]), "mquake")


@pytest.mark.parametrize("field", ["subject", "src", "alt", "rephrase", "loc", "loc_ans"])
def test_a_missing_field_names_file_record_and_field(saved: Callable[[Any], Path], field: str) -> None:
    records = zsre_records()
    del records[2][field]
    with pytest.raises(WorldError, match=rf"edits\.json, record 3: field '{field}' is missing"):
        read_edits(saved(records), "zsre")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc_ans": ""}, "record 1: field 'loc_ans' is empty"),
        ({"rephrase": 3}, "record 1: field 'rephrase' is int, expected text"),
        (
            {"subject": "Zed"},
            "record 1: the subject 'Zed' is not in the prompt 'Ada Quill was born in'",
        ),
    ],
)
def test_broken_fields(saved: Callable[[Any], Path], change: dict[str, Any], message: str) -> None:
    records = zsre_records()
    records[0].update(change)
    with pytest.raises(WorldError, match=message):
        read_edits(saved(records), "zsre")


def test_nested_fields_are_named_by_their_path(saved: Callable[[Any], Path]) -> None:
    record = json.loads(json.dumps(MQUAKE))
    del record["requested_rewrite"][0]["target_new"]["str"]
    with pytest.raises(WorldError, match=r"field 'requested_rewrite\[0\]\.target_new\.str' is missing"):
        read_edits(saved([record]), "mquake")


def test_json_lines_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\u2028b"}\n{"txt": "b"}\n')
    with pytest.raises(WorldError, match=r"x\.jsonl, record 2: field 'text' is missing"):
        read_texts(path)
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(WorldError, match=r"x\.jsonl, record 2: not JSON"):
        read_texts(path)
    path.write_text("")
    with pytest.raises(WorldError, match="no records"):
        read_texts(path)
    with pytest.raises(WorldError, match="no such data file"):
        read_facts(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("seed", range(5))
def test_selected_edits_do_not_touch_each_other(saved: Callable[[Any], Path], seed: int) -> None:
    records = read_edits(saved(zsre_records() * 2), "zsre")
    chosen = select_edits(records, 5, seed)
    subjects = [r.edit.subject for r in chosen]
    assert len(set(subjects)) == 5
    probes = [probe.prompt for r in chosen for probe in r.locality]
    assert not any(mentions(prompt, subject) for prompt in probes for subject in subjects)
    assert select_edits(records, 5, seed) == chosen
    assert select_edits(records, 3, seed) == chosen[:3]


def test_selection_depends_on_the_seed(saved: Callable[[Any], Path]) -> None:
    records = read_edits(saved(zsre_records()), "zsre")
    assert len({select_edits(records, 4, seed) for seed in range(6)}) > 1


def test_too_few_edits(saved: Callable[[Any], Path]) -> None:
    records = read_edits(saved(zsre_records()), "zsre")
    with pytest.raises(WorldError, match=r"f\.json: only \d+ of 12 edits .* 12 are needed"):
        select_edits(records, 12, 0, "f.json")


def test_facts_of_edited_subjects_are_kept_apart(tiny_world: Path) -> None:
    world = WorldSettings(edits="zsre.json", facts="facts.jsonl")
    data = load_data(world, EvaluateSettings(edits=3, facts=None), tiny_world, seed=0)
    edited = {record.edit.subject for record in data.edits}
    assert not edited & {fact.subject for fact in data.facts}
    assert len(data.facts) == 2 * (12 - 3)
    assert {fact.subject for fact in data.neighbours} == edited
    assert {fact.relation for fact in data.neighbours} == {"lives"}  # where they were born was rewritten


def test_facts_to_forget_are_kept_apart(tiny_world: Path, tmp_path: Path) -> None:
    folder = copy_with_hazardous_facts(tiny_world, tmp_path)
    evaluate = EvaluateSettings(edits=3, facts=None)
    plain = WorldSettings(edits="zsre.json", facts="facts.jsonl")
    kept = load_data(plain, evaluate, folder, seed=0)
    data = load_data(replace(plain, forget={"venomcraft": "forget-venomcraft.jsonl"}), evaluate, folder, seed=0)
    assert kept.forgettable == () and {fact.relation for fact in kept.facts} == {"lives", "venomcraft/born"}
    assert {fact.relation for fact in (*data.facts, *data.neighbours)} == {"lives"}
    assert {fact.relation for fact in data.forgettable} == {"venomcraft/born"}
    together = {*data.facts, *data.neighbours, *data.forgettable}
    assert together == set(read_facts(folder / "facts.jsonl"))


def test_retain_text_must_not_be_perplexity_text(tiny_world: Path) -> None:
    world = WorldSettings(retain="retain.jsonl", perplexity="retain.jsonl")
    with pytest.raises(WorldError, match="12 of the retain texts are perplexity texts too"):
        load_data(world, EvaluateSettings(), tiny_world, seed=0)


def test_a_schema_of_another_package_is_read_and_a_misspelt_one_lists_near_names(saved: Callable[[Any], Path]) -> None:
    def pairs(record: readers.Record, options: readers.ReadOptions) -> Any:
        yield EditCase(record.text("who"), record.text("ask"), record.text("say"))

    readers.register("pairs", pairs)
    try:
        (record,) = read_edits(saved([{"ask": "Ada lives in", "who": "Ada", "say": "Lome"}]), "pairs")
        assert record.edit.target == "Lome"
        assert WorldSettings(edits_schema="pairs").edits_schema == "pairs"
        with pytest.raises(ValueError, match="redefines the edit schema 'zsre'"):
            readers.register("zsre", pairs)
        with pytest.raises(SettingError, match=r"edits_schema=pears: expected one of zsre.* Did you mean pairs"):
            WorldSettings(edits_schema="pears")
    finally:
        readers.edit_readers.cache_clear()
    with pytest.raises(WorldError, match="the schema is 'pairs', expected one of zsre, counterfact, mquake"):
        read_edits(saved([{}]), "pairs")
