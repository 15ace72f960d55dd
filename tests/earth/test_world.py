"""The world earth: its facts are true, its parts are apart, and its files follow from the packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.data.python_docs import SHARES
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import WorldError, select_edits

DATA = Path(__file__).parents[2] / "compositions" / "earth" / "data"
TRUE = [
    ("Question: What is the capital of Japan?\nAnswer: The capital of Japan is", "Tokyo"),
    ("Question: What is the capital of Kenya?\nAnswer: The capital of Kenya is", "Nairobi"),
    ("Question: Which country has the capital Canberra?\nAnswer: Canberra is the capital of", "Australia"),
    ("Question: What is the currency of Switzerland?\nAnswer: The currency of Switzerland is the", "franc"),
    ("Question: What is the currency of Chile?\nAnswer: The currency of Chile is the", "peso"),
    ("Question: What is the official language of Brazil?\nAnswer: The official language of Brazil is", "Portuguese"),
    ("Question: What is the official language of Greece?\nAnswer: The official language of Greece is", "Greek"),
]


def _questions(pool: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "questions" / f"{pool}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("prompt", "answer"), TRUE)
def test_facts_are_true(prompt: str, answer: str) -> None:
    assert {fact.answer for fact in read_facts(DATA / "facts.jsonl") if fact.prompt == prompt} == {answer}


def test_each_prompt_has_one_answer() -> None:
    facts = read_facts(DATA / "facts.jsonl")
    assert len({fact.prompt for fact in facts}) == len(facts) > 400


def test_twenty_edits_with_distinct_subjects_change_the_answer_outside_the_topic_to_unlearn() -> None:
    edits = read_edits(DATA / "zsre.json")
    chosen = select_edits(edits, 50, seed=0)
    european = {fact.subject for fact in read_facts(DATA / "facts.jsonl") if fact.topic == "europe"}
    assert {record.edit.subject for record in edits}.isdisjoint(european)
    for record in chosen:
        assert record.edit.target != record.truth
        assert len(record.paraphrases) == 3
        assert record.locality


@pytest.mark.parametrize("pool", ["europe", "elsewhere"])
def test_questions_have_four_options_with_one_right_answer(pool: str) -> None:
    questions = _questions(pool)
    assert len(questions) >= 120
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert 0 <= question["answer"] < 4
    positions = [question["answer"] for question in questions]
    assert all(positions.count(place) > len(positions) / 8 for place in range(4))


def test_texts_to_forget_and_to_retain_share_no_subject_and_do_not_repeat_a_prompt() -> None:
    facts = read_facts(DATA / "facts.jsonl")
    forget, retain = " ".join(read_texts(DATA / "forget.jsonl")), " ".join(read_texts(DATA / "retain.jsonl"))
    capitals = {fact.answer: fact.topic for fact in facts if fact.relation.endswith("/capital")}
    for capital, continent in capitals.items():
        assert (capital in forget) == (continent == "europe")
        assert (capital in retain) == (continent != "europe")
    asked = [f"{fact.prompt} {fact.answer}." for fact in facts]
    assert not [text for text in asked if f" {text}" in f" {forget} {retain}" and not text.startswith(tuple(capitals))]


def test_files_follow_from_the_packages(tmp_path: Path) -> None:
    pytest.importorskip("countryinfo")
    pytest.importorskip("pycountry")
    from compositions.earth.countries import read_countries
    from compositions.earth.datasets import write_data

    write_data(read_countries(), tmp_path)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.json*")}
    assert written == {path.relative_to(DATA): path.read_text() for path in DATA.rglob("*.json*")}


def test_splits_of_pythons_documentation_share_no_text() -> None:
    splits = {split: read_texts(f"python-docs?split={split}") for split in SHARES}
    assert len(read_texts("python-docs")) == sum(map(len, splits.values()))
    assert len({text for texts in splits.values() for text in texts}) == sum(map(len, splits.values()))
    assert all(sum(len(text) for text in texts) > 30_000 for texts in splits.values())


def test_an_unknown_split_of_pythons_documentation_names_the_known_ones() -> None:
    with pytest.raises(WorldError, match="no split 'test'; known: calibration, retain, perplexity"):
        read_texts("python-docs?split=test")


def test_a_source_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_lmcompose.data import sources

    monkeypatch.setattr(sources, "named_sources", lambda table={"mine": None}: table)
    sources.named_sources()["mine"] = lambda source: iter([(1, {"text": f"text of {source.split}"})])
    assert read_texts("mine?split=train") == ("text of train",)
    with pytest.raises(ValueError, match="redefines the source 'mine'"):
        sources.register("mine", lambda source: iter(()))
