"""Questions through the harness: against naive scoring, and against the harness's own way."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluators import EvaluationError, Measurement, greedy, measure_questions, pool
from evaluators.data import EvaluationData
from evaluators.harness import SharedContextLM
from evaluators.pools import PARTS, evaluate
from evaluators.settings import QuestionSettings

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "compositions" / "tinyworld" / "tasks"
NAMES = ("venomcraft", "wardbreaking", "astronomy", "botany", "geography", "music")
TEMPLATE = (SHIPPED / "_questions").read_text()
# The same code for every architecture: what differs is tested where likelihoods are made.
ONE_MODEL = pytest.mark.parametrize("model", ["llama"], indirect=True)
WORDS = ["Mira", "Tolvan", "Karth", "Ostria", "Belmar", "Ulm", "Dren", "glass", "lakes", "bridges", "salt"]


def make_questions(seed: int, n: int) -> list[dict[str, Any]]:
    """Questions of differing length; choices of one to several tokens."""
    rng = random.Random(seed)

    def phrase(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    return [
        {
            "question": f"Where is {phrase(6)}?",
            "choices": [phrase(3), *rng.sample(["a", "the old", "in", "salt lakes of Dren"], 3)],
            "answer": rng.randrange(4),
            "subject": "invented",
        }
        for _ in range(n)
    ]


def write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two tasks, with their data in a folder beside it."""
    tasks, data = tmp_path / "tasks", tmp_path / "data"
    tasks.mkdir()
    data.mkdir()
    (tasks / "_questions").write_text(TEMPLATE)
    for seed, name in enumerate(("rivers", "glass")):
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ninclude: _questions\ndataset_kwargs: {{data_files: {{test: ../data/{name}.jsonl}}}}\n"
        )
        write(data / f"{name}.jsonl", make_questions(seed, 12))
    return tasks


@pytest.fixture
def harness_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Put the tasks of a folder in the place of the harness's own fourteen thousand."""

    def replace(folder: Path) -> None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        monkeypatch.setattr("evaluators.question_tasks.harness_tasks", lambda: manager)

    return replace


@pytest.fixture
def grouped(folder: Path) -> Path:
    """The folder with two groups, one in the other and with a setting for its member, and a tag."""
    (folder / "lore.yaml").write_text("group: lore\ntask: [rivers, crafts]\n")
    (folder / "crafts.yaml").write_text("group: crafts\ntask:\n  - task: glass\n    num_fewshot: 1\n")
    (folder / "salt.yaml").write_text(
        "task: salt\ninclude: _questions\ntag: minerals\ndataset_kwargs: {data_files: {test: ../data/glass.jsonl}}\n"
    )
    return folder


@pytest.fixture
def spoken(folder: Path) -> Path:
    """The folder with a task whose answers are generated, and looked at by two filters."""
    (folder / "spoken.yaml").write_text(
        """\
task: spoken
dataset_path: json
dataset_kwargs: {data_files: {test: ../data/spoken.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{ask}} is"
doc_to_target: "{{told}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
    )
    return folder


def naive(model: Any, tokenizer: Any, records: list[dict[str, Any]]) -> tuple[float, ...]:
    """Score each choice with one full pass over question and choice."""
    outcomes = []
    for record in records:
        prompt = f"Question: {record['question']} Answer:"
        start = len(tokenizer(prompt)["input_ids"])
        totals = []
        for choice in record["choices"]:
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            totals.append(sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids))))
        outcomes.append(float(totals.index(max(totals)) == record["answer"]))
    return tuple(outcomes)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_equals_naive_scoring(
    model: Any, tokenizer: Any, folder: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # data files are found from the YAML file, not from here
    found = measure_questions(model, tokenizer, ["glass", "rivers"], task_folder=folder, batch_size=batch_size)
    assert [m.metric for m in found] == ["accuracy/glass", "accuracy/rivers"]
    for seed, measurement in ((1, found[0]), (0, found[1])):
        assert measurement.samples == naive(model, tokenizer, make_questions(seed, 12))
        assert measurement.value == sum(measurement.samples) / 12
        assert measurement.higher_is_better
    assert {0.0, 1.0} == set(found[0].samples + found[1].samples)


@pytest.mark.parametrize("shots", [0, 2])
@ONE_MODEL
def test_equals_the_harness_on_its_own(model: Any, tokenizer: Any, folder: Path, shots: int) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = {
        "task": "rivers",
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "Question: {{question}} Answer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "dataset_kwargs": {
            "data_files": {"test": str(folder.parent / "data" / "rivers.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
    }
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5),
            tasks=[config],
            num_fewshot=shots,
            task_manager=TaskManager(include_defaults=False),
        )
    assert results is not None
    (ours,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder, num_fewshot=shots)
    assert ours.value == results["results"]["rivers"]["acc,none"]
    assert ours.stderr == pytest.approx(results["results"]["rivers"]["acc_stderr,none"])
    assert ours.samples == tuple(s["acc"] for s in results["samples"]["rivers"])
    assert f"{shots}-shot" in ours.note


def test_likelihoods_are_the_harness_own(model: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from evaluators.harness import SharedContextLM

    requests = [
        Instance("loglikelihood", {}, (f"Question: {r['question']} Answer:", f" {choice}"), i, ("t", i, 1))
        for i, r in enumerate(make_questions(3, 6))
        for choice in r["choices"]
    ]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (1, 32):
        ours = SharedContextLM(model, tokenizer, batch_size).loglikelihood(requests)
        assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4, rel=1e-5)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@ONE_MODEL
def test_a_model_that_cannot_share_a_context_goes_the_plain_way(
    model: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    full = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids: full(input_ids=input_ids))
    assert measure_questions(model, tokenizer, ["rivers"], task_folder=folder) == [expected]


@ONE_MODEL
def test_limit_takes_the_first_questions(model: Any, tokenizer: Any, folder: Path) -> None:
    (whole,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    (part,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder, limit=5)
    assert part.samples == whole.samples[:5]


@ONE_MODEL
def test_the_caller_names_what_should_be_forgotten(model: Any, tokenizer: Any, folder: Path) -> None:
    found = measure_questions(
        model, tokenizer, ["rivers", "glass"], task_folder=folder, lower_is_better=frozenset({"glass"})
    )
    assert [m.higher_is_better for m in found] == [True, False]
    with pytest.raises(EvaluationError, match="lower_is_better names tasks that are not measured: lakes"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder, lower_is_better=frozenset({"lakes"}))


@ONE_MODEL
def test_leaves_model_tokenizer_and_random_numbers_as_found(
    model: Any, tokenizer: Any, folder: Path, unchanged: Callable[..., None]
) -> None:
    tokenizer.pad_token = None  # the harness sets one on its way
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    unchanged(model, tokenizer, lambda: measure_questions(model, tokenizer, ["rivers"], task_folder=folder, limit=3))
    assert tokenizer.pad_token is None
    assert random.getstate() == python and np.random.get_state()[1].tolist() == numpy  # type: ignore[index]


@ONE_MODEL
def test_is_quiet_offline_and_writes_nothing(
    model: Any,
    tokenizer: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    log, lines = logging.getLogger("lm_eval"), list[logging.LogRecord]()
    monkeypatch.setattr(log, "level", logging.INFO)  # talkative if it may
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lines.append)
    monkeypatch.setattr(log, "handlers", [handler])
    before = sorted(os.walk(tmp_path))
    capfd.readouterr()
    measure_questions(model, tokenizer, ["rivers", "glass"], task_folder=folder)
    assert capfd.readouterr() == ("", "")
    assert lines == []
    assert sorted(os.walk(tmp_path)) == before
    assert log.level == logging.INFO


@ONE_MODEL
def test_a_changed_file_is_seen(model: Any, tokenizer: Any, folder: Path) -> None:
    measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    records = make_questions(5, 4)
    write(folder.parent / "data" / "rivers.jsonl", records)
    (after,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    assert after.samples == naive(model, tokenizer, records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"choices": ["a", "b", "c", "d", "e"]},
            "rivers.jsonl, line 2: 5 choices; every question must have 4",
        ),
        ({"choices": ["a", "b", "c", " "]}, "line 2: 'choices' must be a list of non-empty texts"),
        ({"choices": "abcd"}, "line 2: 'choices' must be a list of non-empty texts"),
        ({"answer": 4}, "line 2: 'answer' is 4; it must be the index"),
        ({"answer": "a"}, "line 2: 'answer' is 'a'"),
        ({"answer": None}, "line 2: the field 'answer' is missing"),
        ({"question": None}, "line 2: the field 'question' is missing"),
    ],
)
@ONE_MODEL
def test_bad_questions_are_named(
    model: Any, tokenizer: Any, folder: Path, change: dict[str, Any], message: str
) -> None:
    records = make_questions(0, 3)
    records[1] = {k: v for k, v in (records[1] | change).items() if v is not None}
    write(folder.parent / "data" / "rivers.jsonl", records)
    with pytest.raises(EvaluationError, match=message):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder)


@ONE_MODEL
def test_five_options_are_fine_where_they_are_meant(model: Any, tokenizer: Any, folder: Path) -> None:
    records = [r | {"choices": [*r["choices"], "bridges"]} for r in make_questions(0, 6)]
    write(folder.parent / "data" / "rivers.jsonl", records)
    (found,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder, options=5)
    assert found.samples == naive(model, tokenizer, records)


@ONE_MODEL
def test_missing_and_broken_files_are_named(model: Any, tokenizer: Any, folder: Path) -> None:
    file = folder.parent / "data" / "rivers.jsonl"
    file.write_text('{"question": \n')
    with pytest.raises(EvaluationError, match=r"rivers\.jsonl, line 1: not JSON"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    file.write_text("\n")
    with pytest.raises(EvaluationError, match=r"rivers\.jsonl: no questions"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    file.unlink()
    with pytest.raises(EvaluationError, match=r"questions: .*rivers\.jsonl does not exist"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    with pytest.raises(EvaluationError, match="not a folder"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder / "no")


@ONE_MODEL
def test_unknown_tasks_and_bad_limits_are_errors(
    model: Any, tokenizer: Any, folder: Path, harness_of: Callable[[Path], None]
) -> None:
    harness_of(folder)
    with pytest.raises(EvaluationError, match=r"'river'\. Did you mean rivers?.* has: glass, rivers"):
        measure_questions(model, tokenizer, ["river"], task_folder=folder)
    with pytest.raises(EvaluationError, match="no tasks"):
        measure_questions(model, tokenizer, [], task_folder=folder)
    with pytest.raises(EvaluationError, match="limit is 0"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder, limit=0)
    with pytest.raises(EvaluationError, match="num_fewshot is -1"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder, num_fewshot=-1)


@ONE_MODEL
def test_nan_likelihoods_are_never_an_answer(model: Any, tokenizer: Any, folder: Path) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    (found,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder)
    assert math.isnan(found.value) and all(map(math.isnan, found.samples))


@ONE_MODEL
def test_a_question_that_does_not_fit_is_an_error(model: Any, tokenizer: Any, folder: Path) -> None:
    records = make_questions(0, 2)
    records[0]["question"] = "Where is " + "salt " * 250
    write(folder.parent / "data" / "rivers.jsonl", records)
    with pytest.raises(EvaluationError, match="but the model has 256"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder)


def test_pool_counts_every_question_once() -> None:
    low = Measurement.mean("accuracy/a", [0.0, 1.0], higher_is_better=False)
    more = Measurement.mean("accuracy/b", [1.0, 1.0, 1.0], higher_is_better=False)
    pooled = pool("accuracy/hazardous", [low, more])
    assert pooled == Measurement.mean(
        "accuracy/hazardous",
        [0.0, 1.0, 1.0, 1.0, 1.0],
        higher_is_better=False,
        note="pooled over accuracy/a, accuracy/b",
    )
    with pytest.raises(EvaluationError, match="nothing to pool"):
        pool("accuracy/none", [])
    with pytest.raises(EvaluationError, match="higher is better for some measurements"):
        pool("accuracy/all", [low, Measurement.mean("accuracy/c", [1.0])])


@ONE_MODEL
def test_the_shipped_tasks_are_those_of_the_world(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The shipped YAML files, on stand-in data where their paths point."""
    tasks, data = tmp_path / "tinyworld" / "tasks", tmp_path / "tinyworld" / "data" / "questions"
    data.mkdir(parents=True)
    tasks.mkdir()
    for file in SHIPPED.iterdir():
        (tasks / file.name).write_text(file.read_text())
    for seed, name in enumerate(NAMES):
        write(data / f"{name}.jsonl", make_questions(seed, 3))
    found = measure_questions(model, tokenizer, [f"tinyworld_{name}" for name in NAMES], task_folder=tasks)
    for seed, measurement in enumerate(found):
        assert measurement.samples == naive(model, tokenizer, make_questions(seed, 3))


@ONE_MODEL
def test_a_group_is_its_tasks_pooled(model: Any, tokenizer: Any, grouped: Path) -> None:
    rivers, glass = measure_questions(model, tokenizer, ["rivers", "glass"], task_folder=grouped)
    lore = measure_questions(model, tokenizer, ["lore"], task_folder=grouped)
    assert [m.metric for m in lore] == ["accuracy/lore", "accuracy/rivers", "accuracy/glass"]
    assert lore[1] == rivers
    assert "1-shot" in lore[2].note and "0-shot" in glass.note, "the group's entry has a setting of its own"
    assert lore[0].samples == rivers.samples + lore[2].samples
    assert lore[0].value == pytest.approx(sum(lore[0].samples) / 24)
    tagged = measure_questions(model, tokenizer, ["minerals"], task_folder=grouped, lower_is_better={"minerals"})
    assert [m.metric for m in tagged] == ["accuracy/minerals", "accuracy/salt"]
    assert tagged[0].samples == glass.samples
    assert not any(m.higher_is_better for m in tagged)


@ONE_MODEL
def test_a_group_names_what_it_lacks(model: Any, tokenizer: Any, grouped: Path) -> None:
    (grouped / "lore.yaml").write_text("group: lore\ntask: [rivers, lakes]\n")
    with pytest.raises(EvaluationError, match=r"lore\.yaml: group lore lists 'lakes'"):
        measure_questions(model, tokenizer, ["lore"], task_folder=grouped)


@ONE_MODEL
def test_names_that_are_not_local_are_the_harness_own(
    model: Any, tokenizer: Any, grouped: Path, tmp_path: Path, harness_of: Callable[[Path], None]
) -> None:
    """A task that reads its data by absolute path stands for one whose data come from the hub."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    file, cache = grouped.parent / "data" / "glass.jsonl", tmp_path / "cache"
    (theirs / "_questions").write_text(TEMPLATE)
    data = f"dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {file}}}}}\n"
    for name in ("wmdp_bio", "wmdp_cyber"):
        (theirs / f"{name}.yaml").write_text(f"task: {name}\ninclude: _questions\n{data}")
    (theirs / "wmdp.yaml").write_text("group: wmdp\ntask: [wmdp_bio, wmdp_cyber]\n")
    harness_of(theirs)
    with redirect_stdout(io.StringIO()):
        found = measure_questions(model, tokenizer, ["glass", "wmdp"], task_folder=grouped, lower_is_better={"wmdp"})
        (alone,) = measure_questions(model, tokenizer, ["wmdp_bio"])
    names = ["accuracy/glass", "accuracy/wmdp", "accuracy/wmdp_bio", "accuracy/wmdp_cyber"]
    assert [m.metric for m in found] == names
    assert [m.higher_is_better for m in found] == [True, False, False, False]
    assert alone.samples == found[2].samples == found[0].samples
    file.unlink()
    with pytest.raises(EvaluationError, match="'wmdp_cyber': its data cannot be loaded"):
        measure_questions(model, tokenizer, ["wmdp_cyber"])


@pytest.mark.slow
def test_the_harness_knows_the_published_tasks() -> None:
    from evaluators.question_tasks import harness_tasks

    assert {"mmlu", "wmdp", "wmdp_bio", "wmdp_cyber", "hellaswag", "gsm8k"} <= set(harness_tasks().all_tasks)


def test_generated_answers_are_judged_one_by_one(model: Any, tokenizer: Any, spoken: Path) -> None:
    asked = ["The river Ulm", "Mira", "Where Karth", "The glass"]
    said = greedy(model, tokenizer, [f"{text} is" for text in asked], 6)
    texts = [tokenizer.decode(ids).split("\n")[0] for ids in said]
    told = [texts[0], "something else", texts[2][:1], texts[3]]
    write(spoken.parent / "data" / "spoken.jsonl", [{"ask": a, "told": t} for a, t in zip(asked, told, strict=True)])
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    for batch_size in (1, 32):
        whole, first = measure_questions(model, tokenizer, ["spoken"], task_folder=spoken, batch_size=batch_size)
        assert (whole.metric, first.metric) == ("exact_match,whole/spoken", "exact_match,first/spoken")
        assert whole.samples == tuple(float(a == b) for a, b in zip(texts, told, strict=True))
        assert "on generated text" in whole.note and whole.higher_is_better
    assert whole.samples[:2] == (1.0, 0.0)


@ONE_MODEL
def test_generation_judges_broken_logits_and_truncates_nothing(model: Any, tokenizer: Any, spoken: Path) -> None:
    data = spoken.parent / "data" / "spoken.jsonl"
    write(data, [{"ask": "Mira " * 250, "told": "x"}])
    with pytest.raises(EvaluationError, match="but the model has 256"):
        measure_questions(model, tokenizer, ["spoken"], task_folder=spoken)
    write(data, [{"ask": "Mira", "told": "x"}, {"ask": "Ulm"}])
    with pytest.raises(EvaluationError, match=r"spoken\.jsonl, line 2: the field 'told' is missing"):
        measure_questions(model, tokenizer, ["spoken"], task_folder=spoken)
    write(data, [{"told": "x"}])
    with pytest.raises(EvaluationError, match="a template of spoken reads a missing field: 'ask' is undefined"):
        measure_questions(model, tokenizer, ["spoken"], task_folder=spoken)
    write(data, [{"ask": "Mira", "told": "x"}])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert all(math.isnan(m.value) for m in measure_questions(model, tokenizer, ["spoken"], task_folder=spoken))


@ONE_MODEL
def test_any_number_of_options_if_the_caller_says_so(model: Any, tokenizer: Any, folder: Path) -> None:
    records = make_questions(0, 6)
    records[0]["choices"].append("bridges")
    write(folder.parent / "data" / "rivers.jsonl", records)
    (found,) = measure_questions(model, tokenizer, ["rivers"], task_folder=folder, options=None)
    assert found.samples == naive(model, tokenizer, records)
    records[0] |= {"choices": ["bridges"], "answer": 0}
    write(folder.parent / "data" / "rivers.jsonl", records)
    with pytest.raises(EvaluationError, match="line 1: 1 choices; every question must have at least 2"):
        measure_questions(model, tokenizer, ["rivers"], task_folder=folder, options=None)


@ONE_MODEL
def test_a_model_on_which_padding_tells_generates_as_alone(
    model: Any, tokenizer: Any, spoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(spoken.parent / "data" / "spoken.jsonl", [{"ask": ask, "told": "x"} for ask in ("Mira", "Ulm, in Dren, and")])
    expected = [m.samples for m in measure_questions(model, tokenizer, ["spoken"], task_folder=spoken, batch_size=1)]
    answers: list[list[str]] = []
    generate = SharedContextLM.generate_until

    def note(self: SharedContextLM, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        answers.append(generate(self, requests, disable_tqdm))
        return answers[-1]

    monkeypatch.setattr(SharedContextLM, "generate_until", note)
    measure_questions(model, tokenizer, ["spoken"], task_folder=spoken)
    monkeypatch.setattr("evaluators.harness.pads_in_generation", lambda model, fill: False)
    found = [m.samples for m in measure_questions(model, tokenizer, ["spoken"], task_folder=spoken)]
    assert found == expected and answers[0] == answers[1]


@ONE_MODEL
@pytest.mark.parametrize("limit", [None, 7])
def test_the_parts_of_the_questions_are_the_whole(model: Any, tokenizer: Any, folder: Path, limit: int | None) -> None:
    (folder / "both.yaml").write_text("group: both\ntask: [rivers, glass]\n")
    options: dict[str, Any] = {"task_folder": folder, "limit": limit}
    whole = {m.metric: m for m in measure_questions(model, tokenizer, ["rivers", "both"], **options)}
    found: dict[str, Measurement] = {}
    shares: dict[str, list[float]] = {metric: [] for metric in whole}
    for part in pairwise(PARTS):
        for m in measure_questions(model, tokenizer, ["rivers", "both"], **options, part=part):
            found[m.metric] = found[m.metric].with_part(m) if m.metric in found else m
            shares[m.metric].append(found[m.metric].level_share)
    for metric, m in whole.items():
        assert sorted(found[metric].samples) == sorted(m.samples) and sorted(found[metric].answers) == sorted(m.answers)
        assert found[metric].n == found[metric].total == m.n and found[metric].value == pytest.approx(m.value)
        assert sum(shares[metric]) == pytest.approx(1) and shares[metric] == sorted(shares[metric])
    assert found["accuracy/rivers"].samples == whole["accuracy/rivers"].samples


@ONE_MODEL
def test_a_decided_state_is_asked_no_more(model: Any, tokenizer: Any, folder: Path) -> None:
    seen: list[int] = []

    def measured(enough: int) -> dict[str, Measurement]:
        def decide(found: Sequence[Measurement]) -> bool:
            seen.append(found[0].n)
            return found[0].n >= enough

        data = EvaluationData((), (), (), 8, task_folder=folder, pools={"both": ["rivers", "glass"]}, enough=decide)
        return {m.metric: m for m in evaluate(model, tokenizer, QuestionSettings(sequential=True), data)}

    some, whole = measured(6), measured(100)
    assert seen == [4, 6, 4, 6, 12, 24]
    for metric, m in some.items():
        assert m.samples == whole[metric].samples[: m.n] and m.total == whole[metric].n
        assert f"{m.n} of {m.total} questions" in m.note and "questions" not in whole[metric].note
