"""What the report says its samples asked: never a text that belongs to another sample."""

from __future__ import annotations

from collections.abc import Sequence

from evaluators import Measurement, Probe
from evaluators.data import EditCase, Fact
from interventions.types import Resources
from pytest_lmcompose.data.run_data import RunData
from pytest_lmcompose.report.prompts import LONGEST, prompts
from pytest_lmcompose.results import CompositionResult, Measured, Prompts, replace
from tests.plugin.documents import measured, record, typed_record


def data(*names: str) -> RunData:
    edits = tuple(
        EditCase(
            name,
            f"{name} lives in",
            "Rome",
            (f"{name}'s home is", f"the home of {name} is"),
            (Probe(f"{name} likes", "figs"),),
            truth="Paris",
        )
        for name in names
    )
    facts = tuple(Fact(f"{name} was born in", "Oslo", f"people/{name}", "train", name) for name in names)
    return RunData(Resources(), edits, facts, facts[:1], facts[1:], ("some text",), None)


def recorded(**samples: list[float]) -> CompositionResult:
    """Return the record of a composition; / is written as __."""
    found = [measured(name.replace("__", "/"), values) for name, values in samples.items()]
    return typed_record(record("memit", found))


def texts(found: Sequence[Prompts]) -> dict[str, list[str]]:
    return {metric: list(entry.texts) for entry in found for metric in entry.metrics}


def test_texts_stand_in_the_order_of_the_samples() -> None:
    asked_of = recorded(
        edit_success_f1=[1, 0],
        edit_success_exact=[1, 0],
        edit_paraphrase_f1=[1, 0, 1, 0],
        edit_locality_agreement=[1, 1],
        perplexity_edits_prompt=[1, 2],
        recall=[1, 0],
        **{"recall/people/Bo": [1.0]},
        recall_same_subject=[1],
        recall_to_forget=[1],
        perplexity=[1.0],
        accuracy__tinyworld_music=[1, 0],
    )
    found = prompts({0: data("Al", "Bo")}, [asked_of], {})
    asked = texts(found)
    assert asked["edit_success_f1"] == asked["perplexity_edits_prompt"] == ["Al lives in → Rome", "Bo lives in → Rome"]
    assert asked["edit_paraphrase_f1"][1:3] == ["the home of Al is → Rome", "Bo's home is → Rome"]
    assert asked["edit_locality_agreement"] == ["Al likes → figs", "Bo likes → figs"]
    assert asked["recall"] == ["Al was born in → Oslo", "Bo was born in → Oslo"]
    assert asked["recall/people/Bo"] == ["Bo was born in → Oslo"]
    assert asked["recall_same_subject"] == ["Al was born in → Oslo"]
    assert asked["recall_to_forget"] == ["Bo was born in → Oslo"]
    assert "perplexity" not in asked and "accuracy/tinyworld_music" not in asked
    same = [entry.metrics for entry in found if "edit_success_f1" in entry.metrics]
    assert same == [("edit_success_exact", "edit_success_f1", "perplexity_edits_prompt")]


def test_samples_that_are_not_these_texts_have_none() -> None:
    # Margins are only of prompts with a rival: which ones these were cannot be told from here.
    found = prompts({0: data("Al", "Bo")}, [recorded(edit_success_margin=[0.5], edit_success_f1=[1, 0])], {})
    assert set(texts(found)) == {"edit_success_f1"}


def test_each_repeat_has_texts_of_its_own() -> None:
    one = Measurement.mean("edit_success_f1", [1.0])
    both = Measured.of(Measurement.mean("edit_success_f1", [1.0, 1.0]), [(3, one), (4, one)])
    found = prompts({3: data("Al"), 4: data("Bo")}, [replace(recorded(), measurements=(both,))], {})
    assert [(entry.seed, entry.texts) for entry in found] == [
        (3, ("Al lives in → Rome",)),
        (4, ("Bo lives in → Rome",)),
    ]


def test_long_texts_are_cut() -> None:
    (entry,) = prompts({0: data("A" * 500)}, [recorded(edit_success_f1=[1.0])], {})
    (text,) = entry.texts
    assert len(text) == LONGEST and text.endswith("…")
