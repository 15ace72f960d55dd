"""Worlds of unlearning data: the presets tofu and muse without a network, own files, and runs on them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from pytest_lmcompose.baseline.compare import other_questions
from pytest_lmcompose.build import load
from pytest_lmcompose.cache.address import data_address
from pytest_lmcompose.data.hashes import data_hashes
from pytest_lmcompose.data.records import WorldError
from pytest_lmcompose.data.run_data import RunData, load_data
from pytest_lmcompose.recipe import RecipeError, load_recipe
from pytest_lmcompose.report.prompts import prompts
from pytest_lmcompose.run import CONF
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.plugin.conftest import Project
from tests.plugin.documents import measured, record, typed_record
from tests.plugin.published import muse, questions, texts, tofu, write_hub_cache, write_muse, write_tofu
from tests.plugin.test_run import by_id, read_report
from tests.plugin.tiny import SUBJECTS

EVALUATE = EvaluateSettings()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network whose cache holds the datasets of both presets."""
    cache = write_hub_cache(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


def data_of(world: str, folder: Path, *overrides: str) -> RunData:
    recipe = load_recipe(CONF, (f"world={world}", *overrides))
    return load_data(recipe.world, recipe.evaluate, folder, 0)


def test_the_preset_tofu_reads_the_published_configurations(hub: Path, tmp_path: Path) -> None:
    data = data_of("tofu", tmp_path)
    qa = data.unlearning.qa
    assert {name: len(found) for name, found in qa.items()} == {
        "forget": 4,
        "retain": 3,
        "real_authors": 2,
        "world_facts": 3,
    }
    row = tofu()["forget10_perturbed"][0]
    first = qa["forget"][0]
    assert first.prompt == f"Question: {row['question']}\nAnswer: "
    assert (first.answer, first.paraphrase) == (row["answer"], row["paraphrased_answer"])
    assert first.wrong == tuple(row["perturbed_answer"])
    assert data.resources.forget == {
        "authors": tuple(f"Question: {r['question']}\nAnswer: {r['answer']}" for r in tofu()["forget10"])
    }
    assert data.resources.retain[0] == f"Question: Where was {SUBJECTS[4]} born?\nAnswer: in Karth"
    assert data.perplexity[0] == " = Heading = \n"
    assert len(data.resources.calibration) == 12
    assert not data.unlearning.membership and not data.edits


def test_the_preset_muse_reads_the_published_configurations(hub: Path, tmp_path: Path) -> None:
    data = data_of("muse", tmp_path)
    own = data.unlearning
    assert data.resources.forget == {"news": tuple(row["text"] for row in muse()["raw"]["forget"])}
    assert data.resources.retain == tuple(row["text"] for row in muse()["raw"]["retain1"])
    assert own.membership == {
        name: tuple(row["text"] for row in muse()["privleak"][name]) for name in ("forget", "holdout")
    }
    assert [(probe.prompt, probe.answer) for probe in own.verbatim] == [
        (row["prompt"], row["gt"]) for row in muse()["verbmem"]["forget"]
    ]
    question = own.knowledge["retain"][0]
    examples = "".join(
        f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in muse()["knowmem"]["retain_qa_icl"]
    )
    assert question.prompt == f"{examples}Question: {question.question}\nAnswer: "
    assert not own.qa


def test_other_shares_of_tofu_are_one_override_away(hub: Path, tmp_path: Path) -> None:
    snapshot = next(hub.glob("datasets--locuslab--TOFU/snapshots/*"))
    (snapshot / "forget05.json").write_text('{"question": "Who?", "answer": "Mira"}\n')
    data = data_of("tofu", tmp_path, f"world.forget={{authors: {snapshot}/forget05.json}}")
    assert data.resources.forget == {"authors": ("Question: Who?\nAnswer: Mira",)}


@pytest.mark.parametrize("card", [True, False])
def test_wmdp_corpora_are_forget_and_retain_text(tmp_path: Path, card: bool) -> None:
    """Configurations are named in the card, or are folders; the bio texts lie beside title, abstract and doi."""
    names = ("bio-forget-corpus", "cyber-forget-corpus", "bio-retain-corpus", "cyber-retain-corpus")
    for name in names:
        (tmp_path / "wmdp" / name).mkdir(parents=True)
        more = {"title": "t", "abstract": "a", "doi": "d"} if name == names[0] else {}
        rows = [{**row, **more, "topic": "x" if i % 2 else "y"} for i, row in enumerate(texts(name))]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "wmdp" / name / "train.jsonl").write_text(lines)
    if card:
        files = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in names)
        (tmp_path / "wmdp" / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    world = WorldSettings(
        forget={
            "bio": {"path": "wmdp", "configuration": names[0], "split": "train", "limit": 2},
            "cyber": {"path": "wmdp", "configuration": names[1], "filter": {"topic": "x"}},
        },
        retain=f"wmdp?configuration={names[2]}&split=train&field=text",
    )
    found = load_data(world, EVALUATE, tmp_path, 0).resources
    assert found.forget["bio"] == tuple(row["text"] for row in texts(names[0])[:2])
    assert found.forget["cyber"] == tuple(row["text"] for row in texts(names[1])[1::2])
    assert found.retain == tuple(row["text"] for row in texts(names[2]))


@pytest.mark.parametrize("template", ["[INST] {question} [/INST]{answer}</s>", "{question}{answer}", "Q: {question} "])
def test_a_template_writes_questions_and_texts(tmp_path: Path, template: str) -> None:
    (tmp_path / "qa.csv").write_text("question,answer\nWho {answer}?,Mira\n")
    if "{answer}" not in template:
        with pytest.raises(RecipeError, match=r"world\.qa_template=.*\{question\} and, after it, \{answer\}"):
            load_recipe(CONF, (f"world.qa_template='{template}'",))
        return
    world = WorldSettings(qa={"forget": "qa.csv"}, forget={"a": "qa.csv"}, retain="qa.csv", qa_template=template)
    data = load_data(world, EVALUATE, tmp_path, 0)
    whole = "[INST] Who {answer}? [/INST]Mira</s>" if "INST" in template else "Who {answer}?Mira"
    assert data.resources.forget == {"a": (whole,)} and data.resources.retain == (whole,)
    assert data.unlearning.qa["forget"][0].prompt == whole.partition("Mira")[0]


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("qa", [{"question": "Who?"}], "record 1: field 'answer' is missing; it has question"),
        ("qa", [{"question": " ", "answer": "a"}], "record 1: field 'question' is empty"),
        (
            "qa",
            [*questions(["A"], perturbed=True), *questions(["B"], perturbed=False)],
            "record 2: field 'paraphrased_answer' is missing",
        ),
        (
            "qa",
            [{"question": "q", "answer": "a", "perturbed_answer": wrong} for wrong in (["b"], [])],
            "record 2: field 'perturbed_answer' has no answer",
        ),
        (
            "qa",
            [{"question": "q", "answer": "a", "perturbed_answer": [1]}],
            "'perturbed_answer' is not a list of texts",
        ),
        ("knowledge", [{"text": "t"}], "record 1: field 'question' is missing; it has text"),
    ],
)
def test_errors_name_key_record_and_field(tmp_path: Path, key: str, rows: list[Any], message: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    world = WorldSettings(**{key: {"forget": "rows.json"}})
    with pytest.raises(WorldError, match=rf"^world\.{key}\.forget: .*rows\.json, .*{message}"):
        load_data(world, EVALUATE, tmp_path, 0)


def test_errors_of_texts_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": "p"}]')
    both = dict.fromkeys(("forget", "holdout"), "rows.json")
    for world, key, field in (
        (WorldSettings(verbatim="rows.json"), "verbatim", "gt"),
        (WorldSettings(membership=both), "membership.forget", "text"),
        (WorldSettings(qa={"retain": "none.json"}), "qa.retain", "no such data file"),
    ):
        with pytest.raises(WorldError, match=rf"^world\.{key}: .*{field}"):
            load_data(world, EVALUATE, tmp_path, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world.qa={real_author: a.json}", "world.qa.real_author: no such set. Did you mean real_authors?"),
        ("world.membership={forget: a.json}", "world.membership.holdout is missing"),
        ("world.knowledge_examples={forget: a.json}", "set knowledge.forget"),
        ("world.qa={forget: {file: a.json}}", "world.qa.forget=.*expected a file"),
        ("evaluate.min_k=0", "evaluate.min_k=0: expected"),
    ],
)
def test_keys_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(CONF, (override,))


def test_hashes_and_addresses_follow_the_data_and_the_retain_model(tmp_path: Path) -> None:
    write_tofu(tmp_path / "tofu")
    write_muse(tmp_path / "muse")
    world = WorldSettings(
        qa={"forget": "tofu/forget10_perturbed.json"},
        membership={name: f"muse?configuration=privleak&split={name}" for name in ("forget", "holdout")},
    )

    def identity(
        world: WorldSettings = world, evaluate: EvaluateSettings = EVALUATE, model: str = ""
    ) -> tuple[str, ...]:
        data = load_data(world, evaluate, tmp_path, 0)
        hashes = data_hashes([data], world, evaluate, tmp_path, model)
        return hashes["unlearning data"], data_address(data, "", model)

    first = identity()
    assert identity() == first
    others = [
        identity(model="another"),
        identity(dataclasses.replace(world, qa_template="Q {question} A {answer}")),
        identity(dataclasses.replace(world, membership={})),
        identity(dataclasses.replace(world, qa={"forget": "tofu/forget10_perturbed.json?limit=3"})),
    ]
    assert all(one != other for found in others for one, other in zip(first, found, strict=True))
    assert identity(evaluate=dataclasses.replace(EVALUATE, min_k=0.2))[0] != first[0]
    pair = [{"unlearning data": digest} for digest in (first[0], others[0][0])]
    for metric in ("rouge/forget", "truth_ratio/retain", "model_utility", "verbmem", "knowmem/retain", "privleak"):
        assert other_questions(metric, *pair) == "different unlearning data were used"
    assert world.without_data() == WorldSettings(thresholds="")
    assert load_data(world, dataclasses.replace(EVALUATE, unlearning=False), tmp_path, 0).unlearning.qa == {}


def test_prompts_of_unlearning_samples_are_the_questions(hub: Path, tmp_path: Path) -> None:
    qa, other = data_of("tofu", tmp_path), data_of("muse", tmp_path)
    both = dataclasses.replace(other, unlearning=dataclasses.replace(other.unlearning, qa=qa.unlearning.qa))
    metrics = {"truth_ratio/retain": 3, "rouge/forget": 4, "knowmem/forget": 3, "verbmem": 3, "membership_auc": 5}
    measurements = [measured(name, samples=[0.0] * n) for name, n in metrics.items()]
    found = prompts({0: both}, [typed_record(record("gd", measurements))], {})
    by_metric = {name: one.texts for one in found for name in one.metrics}
    assert by_metric["rouge/forget"][1] == f"Where was {SUBJECTS[1]} born? → in Karth"
    assert by_metric["truth_ratio/retain"][0] == f"Where was {SUBJECTS[4]} born? → in Karth"
    assert by_metric["knowmem/forget"][0] == f"Where was {SUBJECTS[0]} born? → in Karth"
    assert by_metric["verbmem"][0].startswith(f"{SUBJECTS[0]} was seen → ")
    assert by_metric["membership_auc"] == tuple(row["text"] for row in muse()["privleak"]["forget"])


@pytest.fixture
def retain_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Another random model with the same tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "retain")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "retain")
    return tmp_path / "retain"


def run(project: Project, world: str, *more: str, compose: tuple[str, ...] = ("base", "gd")) -> Any:
    short = ("answer_tokens=5", "knowledge_tokens=5", "verbatim_tokens=5", "efficiency=false")
    return project.run(
        f"--lmcompose-set=world={world}",
        *(f"--lmcompose-set=evaluate.{key}" for key in short),
        "--lmcompose-set=gd.lr=0.003",
        "--lmcompose-set=gd.retain_weight=0",
        "--lmcompose-json=report.json",
        *more,
        compose=compose,
    )


def test_a_run_on_tofu_measures_against_a_retain_model_that_is_loaded_once(
    project: Project, hub: Path, retain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.path / "thresholds.yaml").write_text("gd: {answer_probability/forget: {max_ratio: 1}}")
    loaded: list[str] = []
    once: Callable[..., Any] = load.load_model

    def counted(settings: Any, location: str, device: Any) -> Any:
        loaded.append(location)
        return once(settings, location, device)

    monkeypatch.setattr(load, "load_model", counted)
    arguments = ("--lmcompose-cache-dir=cache", f"--lmcompose-set=world.retain_model='{retain_model}'")
    project.arguments = [one for one in project.arguments if one != "--lmcompose-no-cache"]
    assert run(project, "tofu", *arguments).ret == pytest.ExitCode.OK
    assert loaded.count(str(retain_model)) == 1 and len(loaded) == 2
    report = read_report(project.path / "report.json")
    found = {name: {m["metric"]: m for m in one["measurements"]} for name, one in by_id(report).items()}
    for metrics in found.values():
        assert {"forget_quality", "model_utility", "rouge/world_facts", "extraction_strength/forget"} <= metrics.keys()
        assert 0 < metrics["forget_quality"]["value"] <= 1
    forgotten = [found[name]["answer_probability/forget"]["value"] for name in ("base", "gd")]
    assert forgotten[1] < forgotten[0]

    loaded.clear()
    assert run(project, "tofu", *arguments, compose=("ga",)).ret == pytest.ExitCode.OK
    assert str(retain_model) not in loaded  # its truth ratios come from the cache
    metrics = {m["metric"] for m in by_id(read_report(project.path / "report.json"))["ga"]["measurements"]}
    assert "forget_quality" in metrics
    (retain_model / "generation_config.json").unlink()
    assert run(project, "tofu", *arguments, compose=("base",)).ret == pytest.ExitCode.OK
    assert str(retain_model) in loaded


def test_a_retain_model_of_the_hub_is_known_by_its_commit(
    project: Project, hub: Path, retain_model: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = hub / "models--org--retain"
    hashes = []
    for commit in ("a" * 40, "b" * 40):
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        shutil.copytree(retain_model, place / "snapshots" / commit)
        assert run(project, "tofu", "--lmcompose-set=world.retain_model=org/retain", compose=("base",)).ret == 0
        report = by_id(read_report(project.path / "report.json"))
        assert "forget_quality" in {m["metric"] for m in report["base"]["measurements"]}
        hashes.append(report["base"]["data"]["unlearning data"])
    assert hashes[0] != hashes[1]
    absent = ("--lmcompose-set=world=tofu", "--lmcompose-set=world.retain_model=org/absent")
    assert "world.retain_model: 'org/absent' is not a local folder, and the hub" in refused(*absent, compose=("gd",))


def test_a_run_on_muse_in_a_local_folder(project: Project, tmp_path: Path) -> None:
    """The preset's keys, each with a source of its own."""
    write_muse(project.path / "news")
    sources = {
        "forget": {"news": "news?configuration=raw&split=forget"},
        "retain": "news?configuration=raw&split=retain1",
        "verbatim": "news?configuration=verbmem",
        "knowledge": {name: f"news?configuration=knowmem&split={name}_qa" for name in ("forget", "retain")},
        "knowledge_examples": {},
        "membership": {name: f"news?configuration=privleak&split={name}" for name in ("forget", "holdout")},
        "perplexity": "news?configuration=raw&split=holdout",
        "calibration": None,
    }

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
        return "null" if value is None else f"'{value}'"

    own = [f"--lmcompose-set=world.{key}={written(value)}" for key, value in sources.items()]
    (project.path / "thresholds.yaml").write_text("'*': {verbmem: {max: 1}, knowmem/retain: {min: 0}}")
    project.arguments = [one for one in project.arguments if "world.folder" not in one]
    result = run(project, "muse", *own)
    assert result.ret == pytest.ExitCode.USAGE_ERROR  # such gates can never fail
    (project.path / "thresholds.yaml").write_text("'*': {verbmem: {max: 0.9}, privleak: {min: -50}}")
    result = run(project, "muse", *own)
    assert result.ret == pytest.ExitCode.TESTS_FAILED  # without a retain model, there is no privleak
    result.stdout.fnmatch_lines(["*privleak*"])
    report = read_report(project.path / "report.json")
    metrics = {m["metric"]: m for m in by_id(report)["gd"]["measurements"]}
    assert {"verbmem", "knowmem/forget", "knowmem/retain", "membership_auc", "extraction_strength/verbatim"} <= {
        *metrics
    }
    assert not {"privleak", "forget_quality"} & metrics.keys()


def test_a_retain_model_that_is_not_there_is_refused(refused: Callable[..., str], hub: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("./nowhere", str(tmp_path / "empty")):
        message = refused("--lmcompose-set=world=tofu", f"--lmcompose-set=world.retain_model='{path}'", compose=("gd",))
        assert "world.retain_model: " in message
    message = refused("--lmcompose-set=world.retain_model=some/model", compose=("gd",))
    assert "world.retain_model is compared on world.qa.forget or world.membership: set one of them" in message
