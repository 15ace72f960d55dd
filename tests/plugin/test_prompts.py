"""What the report says its samples asked: never a text that belongs to another sample."""

from __future__ import annotations

from typing import Any

from evaluators import Probe
from interventions import Edit
from interventions.types import Resources
from pytest_lmcompose.report.prompts import LONGEST, prompts
from pytest_lmcompose.world.data import RunData
from pytest_lmcompose.world.records import EditRecord, FactRecord


def data(*names: str) -> RunData:
    edits = tuple(
        EditRecord(
            Edit(f"{name} lives in", name, "Rome"),
            (f"{name}'s home is", f"the home of {name} is"),
            (Probe(f"{name} likes", "figs"),),
            "Paris",
        )
        for name in names
    )
    facts = tuple(FactRecord(name, f"{name} was born in", "Oslo", f"people/{name}", "train") for name in names)
    return RunData(Resources(), edits, facts, facts[:1], facts[1:], ("some text",), None)


def record(**samples: list[float]) -> dict[str, Any]:
    found = [{"metric": name.replace("__", "/"), "samples": values} for name, values in samples.items()]
    return {"measurements": found}


def texts(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {metric: entry["texts"] for entry in found for metric in entry["metrics"]}


def test_texts_stand_in_the_order_of_the_samples() -> None:
    measured = record(
        edit_success_f1=[1, 0],
        edit_success_exact=[1, 0],
        edit_paraphrase_f1=[1, 0, 1, 0],
        edit_locality_agreement=[1, 1],
        perplexity_edits_prompt=[1, 2],
        recall=[1, 0],
        recall__people_Bo=[1],
        recall_same_subject=[1],
        recall_to_forget=[1],
        perplexity=[1.0],
        accuracy__tinyworld_music=[1, 0],
    )
    measured["measurements"][6]["metric"] = "recall/people/Bo"
    found = prompts({0: data("Al", "Bo")}, [measured], {})
    asked = texts(found)
    assert asked["edit_success_f1"] == asked["perplexity_edits_prompt"] == ["Al lives in → Rome", "Bo lives in → Rome"]
    assert asked["edit_paraphrase_f1"][1:3] == ["the home of Al is → Rome", "Bo's home is → Rome"]
    assert asked["edit_locality_agreement"] == ["Al likes → figs", "Bo likes → figs"]
    assert asked["recall"] == ["Al was born in → Oslo", "Bo was born in → Oslo"]
    assert asked["recall/people/Bo"] == ["Bo was born in → Oslo"]
    assert asked["recall_same_subject"] == ["Al was born in → Oslo"]
    assert asked["recall_to_forget"] == ["Bo was born in → Oslo"]
    assert "perplexity" not in asked and "accuracy/tinyworld_music" not in asked
    same = [entry["metrics"] for entry in found if "edit_success_f1" in entry["metrics"]]
    assert same == [["edit_success_exact", "edit_success_f1", "perplexity_edits_prompt"]]


def test_samples_that_are_not_these_texts_have_none() -> None:
    # Margins are only of prompts with a rival: which ones these were cannot be told from here.
    found = prompts({0: data("Al", "Bo")}, [record(edit_success_margin=[0.5], edit_success_f1=[1, 0])], {})
    assert set(texts(found)) == {"edit_success_f1"}


def test_each_repeat_has_texts_of_its_own() -> None:
    runs = [{"seed": seed, "samples": [1.0]} for seed in (3, 4)]
    measured = {"measurements": [{"metric": "edit_success_f1", "samples": [1.0, 1.0], "repeats": runs}]}
    found = prompts({3: data("Al"), 4: data("Bo")}, [measured], {})
    assert [(entry["seed"], entry["texts"]) for entry in found] == [
        (3, ["Al lives in → Rome"]),
        (4, ["Bo lives in → Rome"]),
    ]


def test_long_texts_are_cut() -> None:
    (entry,) = prompts({0: data("A" * 500)}, [record(edit_success_f1=[1.0])], {})
    (text,) = entry["texts"]
    assert len(text) == LONGEST and text.endswith("…")
