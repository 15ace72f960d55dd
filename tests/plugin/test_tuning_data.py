"""Prompts with answers, and preferences, of a world: the forms that TRL reads, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interventions.types import Example, Preference
from pytest_lmcompose.data.records import WorldError
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.data.tuning import read_examples, read_preferences
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

EVALUATE = EvaluateSettings()


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, ASKS, SAYS, ASKS_AGAIN, SAYS_AGAIN = (
    turn("system", "Be brief."),
    turn("user", "Who?"),
    turn("assistant", "Mira."),
    turn("user", "Where?"),
    turn("assistant", "In Karth."),
)
SEVERAL = Example("Where?", "In Karth.", chat=True, system="Be brief.", earlier=(("Who?", "Mira."),))


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "Who?", "answer": "Mira"}, Example("Who?", "Mira")),
        ({"prompt": "Who?", "completion": " Mira"}, Example("Who?", "Mira")),
        ({"question": "Who?", "answer": "Mira"}, Example("Who?", "Mira")),
        ({"messages": [ASKS, SAYS]}, Example("Who?", "Mira.", chat=True)),
        ({"messages": [SYSTEM, ASKS, SAYS, ASKS_AGAIN, SAYS_AGAIN]}, SEVERAL),
        ({"messages": [SYSTEM, ASKS, SAYS, ASKS_AGAIN, SAYS_AGAIN, turn("user", "Thanks.")]}, SEVERAL),
        ({"prompt": [SYSTEM, ASKS, SAYS, ASKS_AGAIN], "completion": [SAYS_AGAIN]}, SEVERAL),
        ({"prompt": [ASKS], "answer": "Mira."}, Example("Who?", "Mira.", chat=True)),
    ],
)
def test_examples_in_every_form(row: dict[str, Any], example: Example, tmp_path: Path) -> None:
    assert read_examples("one.jsonl", lines(tmp_path / "one.jsonl", row).parent) == (example,)


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        ({"prompt": "Who?", "chosen": "Mira.", "rejected": "Nobody."}, Preference("Who?", "Mira.", "Nobody.")),
        (
            {"prompt": [ASKS], "chosen": [SAYS], "rejected": [turn("assistant", "Nobody.")]},
            Preference("Who?", "Mira.", "Nobody.", chat=True),
        ),
        (
            {"chosen": [SYSTEM, ASKS, SAYS], "rejected": [SYSTEM, ASKS, turn("assistant", "Nobody.")]},
            Preference("Who?", "Mira.", "Nobody.", chat=True, system="Be brief."),
        ),
    ],
)
def test_preferences_in_every_form(row: dict[str, Any], preference: Preference, tmp_path: Path) -> None:
    assert read_preferences("one.jsonl", lines(tmp_path / "one.jsonl", row).parent) == (preference,)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Who?"}, "field 'answer' is missing; it has prompt"),
        ({"prompt": " ", "answer": "Mira"}, "field 'prompt' is empty"),
        ({"prompt": "Who?", "answer": ["Mira"]}, "field 'answer' is list, expected text"),
        ({"messages": [ASKS]}, "no turn of the assistant"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": "Who?"}, "field 'messages' is str, expected a list"),
        ({"messages": [turn("tool", "1"), SAYS]}, "the role 'tool' is none of system, user, assistant"),
        ({"messages": [{"role": "user"}, SAYS]}, "field 'messages[0].content' is missing"),
        ({"messages": [ASKS, ASKS_AGAIN, SAYS]}, "one after the other, the last of the user; found user, user"),
        ({"messages": [SAYS]}, "the last of the user; found none"),
        ({"prompt": [ASKS], "completion": [ASKS_AGAIN, SAYS]}, "'completion': expected one turn of the assistant"),
    ],
)
def test_an_example_that_cannot_be_read_is_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    lines(tmp_path / "one.jsonl", {"prompt": "Who?", "answer": "Mira"}, row)
    with pytest.raises(WorldError) as error:
        load_data(WorldSettings(tuning={"mine": "one.jsonl"}), EVALUATE, tmp_path, 0)
    assert "world.tuning.mine: " in str(error.value) and "one.jsonl, record 2: " in str(error.value)
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Who?", "chosen": "Mira."}, "field 'rejected' is missing"),
        ({"prompt": "Who?", "chosen": "Mira.", "rejected": "Mira. "}, "'chosen' and 'rejected' are the same, 'Mira.'"),
        ({"chosen": "Mira.", "rejected": "Nobody."}, "field 'chosen' is str, expected a list"),
        ({"chosen": [ASKS, SAYS], "rejected": [ASKS_AGAIN, SAYS]}, "differ in the last turn"),
        ({"chosen": [ASKS], "rejected": [ASKS]}, "end with the assistant"),
    ],
)
def test_a_preference_that_cannot_be_read_is_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    lines(tmp_path / "one.jsonl", row)
    with pytest.raises(WorldError) as error:
        load_data(WorldSettings(preferences="one.jsonl"), EVALUATE, tmp_path, 0)
    assert "world.preferences: " in str(error.value) and "one.jsonl, record 1: " in str(error.value)
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["tuning", "tuning_heldout"])
def test_an_empty_file_is_an_error(key: str, tmp_path: Path) -> None:
    lines(tmp_path / "none.jsonl")
    with pytest.raises(WorldError, match=rf"world.{key}.mine: .*none.jsonl: no records"):
        load_data(WorldSettings(**{key: {"mine": "none.jsonl"}}), EVALUATE, tmp_path, 0)


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"prompt": "Who?", "answer": "Mira"}, {"prompt": "Where?", "answer": "Karth"})
    lines(tmp_path / "other.jsonl", {"prompt": "When?", "answer": "Now"})
    lines(tmp_path / "leak.jsonl", {"prompt": "Why?", "answer": "So"}, {"question": "Where?", "answer": "Karth"})
    leaking = WorldSettings(
        tuning={"mine": "train.jsonl", "other": "other.jsonl"}, tuning_heldout={"other": "leak.jsonl"}
    )
    problem = r"world.tuning_heldout.other: 1 of 2 rows are training rows too, for instance 'Where\?'"
    with pytest.raises(WorldError, match=problem):
        load_data(leaking, EVALUATE, tmp_path, 0)
    lines(tmp_path / "pairs.jsonl", {"prompt": "Who?", "chosen": "Mira", "rejected": "Nobody"})
    both = WorldSettings(preferences="pairs.jsonl", preferences_heldout="pairs.jsonl")
    with pytest.raises(WorldError, match=r"world.preferences_heldout: 1 of 1 rows"):
        load_data(both, EVALUATE, tmp_path, 0)


def test_methods_get_the_training_rows_and_evaluators_the_others(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"q": "Who?", "a": "Mira"})
    lines(tmp_path / "heldout.jsonl", {"prompt": "Tell me who.", "answer": "Mira"})
    world = WorldSettings(
        tuning={"mine": {"path": "train.jsonl", "fields": {"prompt": "q", "answer": "a"}}},
        tuning_heldout={"mine": "heldout.jsonl"},
    )
    found = load_data(world, EVALUATE, tmp_path, 0)
    assert found.resources.tuning == {"mine": (Example("Who?", "Mira"),)}
    assert found.tuning.sets == {"mine": (Example("Tell me who.", "Mira"),)}
    assert not load_data(world, EvaluateSettings(tuning=False), tmp_path, 0).tuning.sets
