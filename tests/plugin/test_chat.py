"""Runs whose prompts are put into the model's chat template."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from interventions import tokens
from pytest_lmcompose.build.chat import check_chat
from pytest_lmcompose.cache.address import retained_address
from pytest_lmcompose.data.hashes import data_hashes
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.measure import capture_retained, capture_unedited, measure_state
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.recipe import RecipeError
from pytest_lmcompose.run_setup import RunSetup
from pytest_lmcompose.settings import EvaluateSettings, ModelSettings, WorldSettings
from tests.chat_templates import FAMILIES, chat_tokenizer
from tests.plugin.conftest import Project
from tests.plugin.published import write_muse, write_tofu
from tests.plugin.test_measure import WORLD
from tests.plugin.test_run import by_id, read_report

ON = "--lmcompose-set=evaluate.chat_template=true"
SYSTEM = "--lmcompose-set=evaluate.system_prompt='Answer with one word.'"
CHATML = FAMILIES["ChatML without BOS"].template
SHORT = {"answer_tokens": 5, "knowledge_tokens": 5, "verbatim_tokens": 5}
ASKED = {"edits", "facts", "questions", "unlearning data", "tuning data", "refusal prompts"}
"""Parts of the data with prompts."""


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the random model with a ChatML template, whose tokenizer adds BOS."""
    return with_template(tiny_model, tmp_path / "model")


def with_template(model: Path, folder: Path, template: Any = CHATML) -> Path:
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([SYSTEM], "evaluate.system_prompt=Answer with one word.: expected chat_template=true as well"),
        (
            ["--lmcompose-set=evaluate.chat_template_args={a:1}"],
            "chat_template_args={'a': 1}: expected chat_template=true",
        ),
        (
            [ON, "--lmcompose-set=evaluate.chat_template_args={tokenize:1}"],
            "expected values of the template's variables",
        ),
        (["--lmcompose-set=evaluate.chat_template=yes"], "evaluate.chat_template=yes: expected true or false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(refused: Callable[..., str], given: list[str], problem: str) -> None:
    error = refused(*given)
    assert error.count(problem) == 1 and "Traceback" not in error


def test_a_model_without_a_template_is_refused_before_any_work(refused: Callable[..., str], tiny_model: Path) -> None:
    for more in ((), ("--collect-only",)):
        assert (
            refused(ON, *more).count(
                f"evaluate.chat_template=true: the tokenizer of {tiny_model} has no chat template; set "
                "evaluate.chat_template=false, or use a model with one"
            )
            == 1
        )


def test_a_model_of_the_hub_is_refused_when_it_is_loaded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunSetup, "_check_chat", lambda self: None)  # as where there is no folder to look into
    result = project.run(ON, compose=("nudge",))
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*has no chat template; set evaluate.chat_template=false, or use a model with one*"])


@pytest.mark.parametrize(
    ("family", "template", "settings", "problem"),
    [
        ("Gemma", None, {"system_prompt": "x"}, "evaluate.system_prompt: ./m: *System role not supported; remove eval"),
        (
            "without a system turn",
            None,
            {"system_prompt": "x"},
            "evaluate.system_prompt: ./m: *leaves the system prompt",
        ),
        (
            "Llama 3",
            {"b": "{{ 1 }}", "a": "{{ 1 }}"},
            {},
            "templates a, b; choose one with evaluate.chat_template_args={c",
        ),
        (
            "Llama 3",
            {"b": "{{ 1 }}"},
            {"chat_template_args": {"chat_template": "c"}},
            "has the chat templates b; choose",
        ),
        ("Llama 3", "{% for %}", {}, "evaluate.chat_template=true: ./m: the chat template cannot be applied: "),
        (
            "Llama 3",
            "{{ raise_exception('two\nlines') }}",
            {"system_prompt": "x"},
            "chat_template=true: *: two lines; set",
        ),
    ],
)
def test_a_template_that_cannot_show_the_prompts_is_refused(
    family: str, template: Any, settings: dict[str, Any], problem: str
) -> None:
    tokenizer = chat_tokenizer(family)
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(RecipeError) as error:
        check_chat(tokenizer, EvaluateSettings(chat_template=True, **settings), "./m")
    line = str(error.value)
    assert "\n" not in line
    pytest.LineMatcher([line]).fnmatch_lines([f"*{problem}*"])


@pytest.mark.parametrize(
    ("family", "template", "settings"),
    [
        ("Gemma", None, {}),
        ("Llama 3", None, {"system_prompt": " Be short.\n"}),
        ("Llama 3", {"default": CHATML, "a": "{{ 1 }}"}, {}),
        ("Llama 3", {"b": CHATML}, {"chat_template_args": {"chat_template": "b"}}),
    ],
)
def test_a_template_that_shows_the_prompts_passes(family: str, template: Any, settings: dict[str, Any]) -> None:
    tokenizer = chat_tokenizer(family)
    tokenizer.chat_template = template or tokenizer.chat_template
    check_chat(tokenizer, EvaluateSettings(chat_template=True, **settings), "./m")
    tokenizer.chat_template = None
    check_chat(tokenizer, EvaluateSettings(), "./m")


def test_every_prompt_is_in_the_template_and_running_text_is_not(
    chat_model: Path, tiny_world: Path, unlearning_world: WorldSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    asked: list[tuple[str, bool]] = []
    read = tokens.read

    def watched(tokenizer: Any, texts: list[str], *, begin: bool = True) -> list[tokens.Text]:
        asked.extend((text, begin) for text in texts)
        return read(tokenizer, texts, begin=begin)

    monkeypatch.setattr(tokens, "read", watched)
    found = {}
    for on in (False, True):
        asked.clear()
        system = "Answer with one word." if on else ""
        chat: dict[str, Any] = {"chat_template": on, "system_prompt": system}
        evaluate = EvaluateSettings(edits=3, facts=8, latency_length=16, **chat, **SHORT)
        data = load_data(unlearning_world, evaluate, tiny_world, seed=0)
        unedited = capture_unedited(model, tokenizer, data, evaluate)
        retained = capture_retained(model, tokenizer, data, evaluate)
        measured = measure_state(model, tokenizer, data, unlearning_world, evaluate, unedited, retained=retained)
        found[on] = {m.metric: m.value for m in measured}
        assert (found[on]["forget_quality"], found[on]["privleak"]) == (1, 0)  # retained is asked in the same way
        own = data.unlearning
        running = {*own.membership["forget"], *own.membership["holdout"], *(probe.prompt for probe in own.verbatim)}
        start = "<|im_start|>system\nAnswer with one word.<|im_end|>\n<|im_start|>user\n"
        plain = [text for text, _ in asked if not text.startswith(start)]
        assert all(begin != text.startswith(start) for text, begin in asked)
        if on:
            assert plain and all(text.startswith(tuple(running)) for text in plain)
            turns = [text.partition("<|im_start|>user\n")[2] for text, _ in asked]
            for question in (*own.qa["forget"], *own.knowledge["retain"]):
                shown = "".join(
                    f"{one}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n"
                    for one, answer in question.examples
                )
                assert any(turn.startswith(f"{shown}{question.question}<|im_end|>") for turn in turns)
            assert own.knowledge["retain"][0].examples and not any("Question:" in text for text, _ in asked)
        else:
            assert len(plain) == len(asked) > 0
    assert found[True].keys() == found[False].keys()
    same = {metric for metric, value in found[True].items() if value == found[False][metric]}
    assert {"perplexity", "average_bits", "edit_locality_agreement", "verbmem", "membership_auc"} <= same
    assert {"extraction_strength/verbatim"} <= same and "answer_probability/forget" not in same
    assert not {"perplexity_qa", "perplexity_edits", "perplexity_edits_prompt", "edit_success_margin"} & same


@pytest.fixture
def unlearning_world(tmp_path: Path) -> WorldSettings:
    """The small world with TOFU's and MUSE's data."""
    write_tofu(tmp_path / "tofu")
    news = f"{write_muse(tmp_path / 'muse')}?configuration="
    return replace(
        WORLD,
        qa={"forget": str(tmp_path / "tofu" / "forget10_perturbed.json")},
        knowledge={"retain": f"{news}knowmem&split=retain_qa"},
        knowledge_examples={"retain": f"{news}knowmem&split=retain_qa_icl&limit=1"},
        verbatim=f"{news}verbmem",
        membership={name: f"{news}privleak&split={name}" for name in ("forget", "holdout")},
    )


def test_results_of_the_retain_model_are_those_of_its_prompts(tiny_world: Path) -> None:
    def address(asked: str | None = None, **settings: Any) -> str:
        return retained_address("m", ModelSettings("m"), data, EvaluateSettings(**settings), "cpu", asked)

    data = load_data(WORLD, EvaluateSettings(edits=3), tiny_world, seed=0)
    plain, chat = address(), address("user {}", chat_template=True)
    others = [address("Monday. user {}", chat_template=True), address("user {}", chat_template=True, system_prompt="x")]
    assert address("user {}", chat_template=True) == chat
    assert len({plain, chat, *others}) == 4


def test_a_retain_model_without_a_template_is_refused_before_any_work(
    refused: Callable[..., str], project: Project, chat_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    write_tofu(tmp_path / "tofu")
    project.arguments[0] = f"--lmcompose-model={chat_model}"
    sets = f"--lmcompose-set=world.qa={{forget: '{tmp_path / 'tofu' / 'forget10_perturbed.json'}'}}"
    error = refused(ON, sets, f"--lmcompose-set=world.retain_model='{tiny_model}'")
    assert f"evaluate.chat_template=true: the tokenizer of {tiny_model} has no chat template" in error


def test_answers_in_the_template_are_answers_to_other_questions(tiny_world: Path) -> None:
    def hashes(**settings: Any) -> dict[str, str]:
        evaluate = EvaluateSettings(edits=3, **settings)
        return data_hashes([data], WORLD, evaluate, tiny_world)

    data = load_data(WORLD, EvaluateSettings(edits=3), tiny_world, seed=0)
    plain, chat = hashes(), hashes(chat_template=True)
    assert {part for part in plain if plain[part] != chat[part]} == ASKED
    for settings in ({"system_prompt": "Be short."}, {"chat_template_args": {"enable_thinking": False}}):
        other = hashes(chat_template=True, **settings)
        assert {part for part in chat if chat[part] != other[part]} == ASKED


def test_a_run_in_the_template_is_not_compared_with_one_without(
    project: Project, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (project.path / "thresholds.yaml").write_text('"*": {perplexity: {max: 1e9}}')
    project.arguments[0] = f"--lmcompose-model={chat_model}"
    assert project.run("--lmcompose-save=plain", compose=("nudge",)).ret == pytest.ExitCode.OK
    result = project.run(
        ON,
        SYSTEM,
        "--lmcompose-compare=plain",
        "--lmcompose-json=report.json",
        "--lmcompose-save=chat",
        compose=("nudge",),
    )
    assert result.ret == pytest.ExitCode.OK
    report = read_report(project.path / "report.json")
    assert report["recipe"]["evaluate"]["system_prompt"] == "Answer with one word."
    assert report["model"]["tokenisation"]["chat"] == (
        "<|im_start|>system\nAnswer with one word.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    verdicts = {row["metric"]: row["verdict"] for row in report["comparison"]["rows"] if row["composition"] == "nudge"}
    assert {verdict for metric, verdict in verdicts.items() if metric.startswith(("edit_", "recall"))} == {"unknown"}
    assert (verdicts["perplexity_qa"], verdicts["perplexity"]) == ("unknown", "equal")


@pytest.mark.slow
def test_the_embedded_model_with_a_template(project: Project, tmp_path: Path) -> None:
    model = with_template(SUITE_FOLDER / "tinyworld" / "model", tmp_path / "tinyworld")
    (project.path / "thresholds.yaml").write_text('"*": {perplexity: {max: 1e9}}')
    kept = ("--lmcompose-thresholds", "--lmcompose-no-cache", "--lmcompose-world")
    project.arguments = [*(one for one in project.arguments if one.startswith(kept)), f"--lmcompose-model={model}"]
    few = ("edits=2", "facts=20", "texts=4", "question_limit=8")
    settings = [f"--lmcompose-set={setting}" for setting in (f"evaluate.{one}" for one in few)]
    result = project.run(*settings, ON, "--lmcompose-json=report.json", compose=("base",))
    assert result.ret == pytest.ExitCode.OK
    report = read_report(project.path / "report.json")
    values = {m["metric"]: m["value"] for m in by_id(report)["base"]["measurements"]}
    assert {"recall", "edit_success_exact", "perplexity_qa", "accuracy/harmless", "perplexity"} <= values.keys()
    assert report["model"]["tokenisation"]["chat"].endswith("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")


def test_measurements_of_another_day_are_not_reused_where_the_template_writes_the_date(
    project: Project, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{% set date = date | default(strftime_now('%j')) %}" + CHATML.replace("You help.", "Day {{ date }}.")
    project.arguments[0] = f"--lmcompose-model={with_template(tiny_model, tmp_path / 'model', dated)}"
    project.arguments[-1] = f"--lmcompose-cache-dir={tmp_path / 'cache'}"

    def days(*more: str) -> tuple[str, bool]:
        result = project.run(ON, "--lmcompose-json=report.json", *more, compose=("nudge",))
        text = result.stdout.str()
        asked = read_report(project.path / "report.json")["model"]["tokenisation"]["chat"]
        return asked.partition("Day ")[2].partition(".")[0], "measurements read from the cache" in text

    fixed = "--lmcompose-set=evaluate.chat_template_args={date:'1'}"
    assert [days(fixed), days(fixed)] == [("1", False), ("1", True)]
    today, read = days()
    assert today != "1" and not read
    render = tokens.Chat.ask
    monkeypatch.setattr(tokens.Chat, "ask", lambda *a: render(*a).replace(f"Day {today}.", "Day 0."))
    assert days() == ("0", False)
