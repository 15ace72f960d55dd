"""What a recipe's keys measure, on a random model and a small world."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluators import EvaluationError, Measurement, Probe
from evaluators.metrics import find_metric
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.measure import capture_unedited, measure_state
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.plugin.tiny import PLACES, SUBJECTS, copy_with_hazardous_facts

NOTHING = EvaluateSettings(
    edits=3,
    facts=8,
    editing=False,
    recall=False,
    perplexity=False,
    closeness=False,
    questions=False,
    unlearning=False,
    tuning=False,
    refusal=False,
    efficiency=False,
)
WORLD = WorldSettings(
    edits="zsre.json",
    facts="facts.jsonl",
    perplexity="perplexity-heldout.jsonl",
    tasks="../tasks",
    pools={"hazardous": ["tinyworld_venomcraft", "tinyworld_wardbreaking"], "harmless": ["tinyworld_botany"]},
    hazardous=["hazardous"],
)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


def metrics(loaded: tuple[Any, Any], folder: Path, world: WorldSettings, **wanted: Any) -> list[str]:
    evaluate = dataclasses.replace(NOTHING, **wanted)
    data = load_data(world, evaluate, folder, seed=0)
    unedited = capture_unedited(*loaded, data, evaluate)
    return [m.metric for m in measure_state(*loaded, data, world, evaluate, unedited)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, []),
        ({"recall": True}, ["recall", "recall/born", "recall/lives", "recall_same_subject"]),
        ({"perplexity": True}, ["perplexity_qa", "perplexity_edits", "perplexity_edits_prompt", "perplexity"]),
        (
            {"questions": True},
            [
                "accuracy/hazardous",
                "accuracy/harmless",
                "accuracy/tinyworld_venomcraft",
                "accuracy/tinyworld_wardbreaking",
                "accuracy/tinyworld_botany",
            ],
        ),
        (
            {"efficiency": True, "latency_length": 16},
            ["average_bits", "overhead_bits", "sparsity", "sparsity_2_4", "packed_megabytes", "flops_per_token"],
        ),
        ({"latency": True, "latency_length": 16, "latency_repeats": 2}, ["latency_ms", "tokens_per_second"]),
    ],
)
def test_each_key_measures_its_own(
    loaded: tuple[Any, Any], tiny_world: Path, wanted: dict[str, Any], found: list[str]
) -> None:
    assert metrics(loaded, tiny_world, WORLD, **wanted) == found


def test_recall_of_what_is_to_be_forgotten_is_measured_apart(
    loaded: tuple[Any, Any], tiny_world: Path, tmp_path: Path
) -> None:
    folder = copy_with_hazardous_facts(tiny_world, tmp_path)
    world = WorldSettings(facts="facts.jsonl", forget={"venomcraft": "forget-venomcraft.jsonl"})
    evaluate = dataclasses.replace(NOTHING, recall=True)
    found = measure_state(*loaded, load_data(world, evaluate, folder, seed=0), world, evaluate, None)
    better = {m.metric: m.higher_is_better for m in found}
    assert better == {"recall": True, "recall/lives": True, "recall_to_forget": False}


def test_further_tasks_stand_beside_the_pools(loaded: tuple[Any, Any], tiny_world: Path) -> None:
    wanted = {"questions": True, "tasks": ["tinyworld_music", "tinyworld_botany"], "num_fewshot": 1}
    found = metrics(loaded, tiny_world, WORLD, **wanted)
    assert found.count("accuracy/tinyworld_botany") == 1 and "accuracy/tinyworld_music" in found
    alone = dataclasses.replace(WORLD, pools={}, hazardous=[])
    assert metrics(loaded, tiny_world, alone, **wanted) == ["accuracy/tinyworld_music", "accuracy/tinyworld_botany"]


def test_the_number_of_options_is_the_recipes(loaded: tuple[Any, Any], tiny_world: Path) -> None:
    with pytest.raises(EvaluationError, match="4 choices; every question must have 5"):
        metrics(loaded, tiny_world, WORLD, questions=True, options=5)
    assert metrics(loaded, tiny_world, WORLD, questions=True, options=None)


def test_edits_with_consequences_measure_portability(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    records = [
        {
            "requested_rewrite": [
                {
                    "prompt": "{} was born in",
                    "subject": subject,
                    "question": f"Where was {subject} born?",
                    "target_true": {"str": PLACES[0]},
                    "target_new": {"str": PLACES[1]},
                }
            ],
            "questions": [f"In which land was {subject} born?", f"{subject} is a native of"],
            "answer": "Ostria",
            "new_answer": "Veld",
            "single_hops": [{"question": "q", "cloze": f"{PLACES[0]} lies in", "answer": "Ostria"}],
            "new_single_hops": [{"question": "r", "cloze": f"{PLACES[1]} lies in", "answer": "Veld"}],
        }
        for subject in SUBJECTS
    ]
    (tmp_path / "mquake.json").write_text(json.dumps(records))
    facts = [
        {"subject": s, "prompt": f"{s} {verb}", "answer": a, "relation": r}
        for s in SUBJECTS
        for verb, a, r in (
            ("was born in", PLACES[0], "born"),
            ("comes from", "Ostria", "land"),
            ("has a", "cat", "pet"),
        )
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    world = WorldSettings(
        edits="mquake.json", edits_schema="mquake", facts="facts.jsonl", ask_as="Question: {} Answer:"
    )
    found = metrics(loaded, tmp_path, world, editing=True)
    aspects = ("success", "paraphrase", "portability", "locality")
    kinds = ("f1", "recall", "exact", "margin", "preferred")
    assert found == [f"edit_{a}_{k}" for a in aspects for k in kinds] + ["edit_locality_agreement"]
    data = load_data(world, NOTHING, tmp_path, seed=0)
    assert {fact.relation for fact in data.neighbours} == {"pet"}, "where they come from follows from the edit"
    record = data.edits[0]
    assert record.portability[0].prompt == f"Question: In which land was {record.subject} born? Answer:"
    assert record.portability[1] == Probe(f"{record.subject} is a native of", "Veld", "Ostria")


def test_progress_names_each_evaluator_before_it_runs(loaded: tuple[Any, Any], tiny_world: Path) -> None:
    evaluate = dataclasses.replace(NOTHING, recall=True, perplexity=True, efficiency=True, latency_length=16)
    seen: list[tuple[str, int, int]] = []
    data = load_data(WORLD, evaluate, tiny_world, seed=0)
    measure_state(*loaded, data, WORLD, evaluate, None, lambda *told: seen.append(told))
    assert seen == [("recall", 1, 3), ("perplexity", 2, 3), ("efficiency", 3, 3)]


def test_facts_are_scored_once_for_recall_and_perplexity(
    loaded: tuple[Any, Any], tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluators import recall

    score, calls = recall.score_facts, []
    monkeypatch.setattr(recall, "score_facts", lambda *args, **kwargs: calls.append(1) or score(*args, **kwargs))
    world = dataclasses.replace(WORLD, edits=None)
    assert metrics(loaded, tiny_world, world, recall=True, perplexity=True)[-2:] == ["perplexity_qa", "perplexity"]
    assert len(calls) == 1


def test_every_metric_that_built_in_evaluators_make_is_described(loaded: tuple[Any, Any], tiny_world: Path) -> None:
    evaluate = EvaluateSettings(edits=3, facts=8, latency=True, latency_length=16, latency_repeats=2)
    data = load_data(WORLD, evaluate, tiny_world, seed=0)
    for found in measure_state(*loaded, data, WORLD, evaluate, capture_unedited(*loaded, data, evaluate)):
        metric = find_metric(found.metric, higher_is_better=found.higher_is_better)
        assert metric.unit and metric.higher_is_better == found.higher_is_better, found.metric
        assert metric.low <= found.value <= metric.high, found.metric
        assert metric.data and metric.sampled == ("not sampled" not in found.note), found.metric


def test_wanted_metrics_come_first_and_who_watches_may_stop(loaded: tuple[Any, Any], tiny_world: Path) -> None:
    evaluate = dataclasses.replace(NOTHING, recall=True, perplexity=True, efficiency=True, latency_length=16)
    data = load_data(WORLD, evaluate, tiny_world, seed=0)
    seen: list[tuple[str, ...]] = []

    def watch(found: Sequence[Measurement]) -> None:
        seen.append(tuple(m.metric for m in found))
        if len(seen) == 3:
            raise KeyError("enough")

    plain = measure_state(*loaded, data, WORLD, evaluate, None)
    assert measure_state(*loaded, data, WORLD, evaluate, None, first=["sparsity"], watch=watch) == plain
    assert [names[0] for names in seen] == ["average_bits", "average_bits"] and seen[1][-1].startswith("recall")
    with pytest.raises(KeyError, match="enough"):
        measure_state(*loaded, data, WORLD, evaluate, None, watch=watch)
