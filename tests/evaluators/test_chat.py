"""Prompts in chat templates have the tokens that transformers and lm-evaluation-harness give them."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from evaluators import (
    Chat,
    EditCase,
    EvaluationError,
    Fact,
    Probe,
    capture_unedited,
    greedy,
    log_likelihood,
    measure_answer_perplexity,
    measure_editing,
    measure_questions,
    measure_recall,
)
from evaluators.encoding import encode, encode_pairs
from evaluators.harness import SharedContextLM
from evaluators.measurement import shorten
from interventions import Edit
from interventions.edit.kernels.prompts import tokenise
from tests.chat_templates import FAMILIES, chat_tokenizer
from tests.evaluators.test_same_tokens import Parrot

QUESTIONS = (
    "Where was Mira Tolvan born?",
    "Q: who is it?\nA:",
    "Mira plays the",
    "the lute, the sea: " * 60,  # longer than a tokenizer's limit
)
SYSTEM = "Answer with one word."
MADE = {family: chat_tokenizer(family) for family in FAMILIES}
WITH_SYSTEM = [family for family, found in FAMILIES.items() if found.system]
CASES = [(family, "") for family in FAMILIES] + [(family, SYSTEM) for family in WITH_SYSTEM]


def turns(question: str, system: str = "", answer: str = "") -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    after = [{"role": "assistant", "content": answer}] if answer else []
    return [*before, {"role": "user", "content": question}, *after]


def ids_of(tokenizer: Any, question: str, system: str = "", answer: str = "", **values: Any) -> list[int]:
    """Return what transformers makes of a question, and of an answer if there is one."""
    messages, asked = turns(question, system, answer), not answer
    found = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=asked, **values)
    return list(found["input_ids"])


def answer_ids(tokenizer: Any, question: str, answer: str) -> list[int]:
    """Return what follows a question, an answer and what ends it, where transformers writes both."""
    asked, whole = ids_of(tokenizer, question), ids_of(tokenizer, question, answer=answer)
    assert whole[: len(asked)] == asked
    return whole[len(asked) :]


def model_for(tokenizer: Any, positions: int = 512) -> Any:
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=positions, initializer_range=0.4, eos_token_id=1, **shape
    )
    return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("family", "system"), CASES)
def test_prompts_and_answers_have_the_tokens_that_transformers_gives_them(family: str, system: str) -> None:
    tokenizer, chat = MADE[family], Chat(system)
    tokenizer.model_max_length = 64
    asked = [ids_of(tokenizer, question, system) for question in QUESTIONS]
    assert encode(tokenizer, QUESTIONS, chat) == asked
    for answer in ("Karth", "the lute", " Karth\n"):
        pairs = encode_pairs(tokenizer, [(question, answer) for question in QUESTIONS], chat)
        assert [pair.prompt for pair in pairs] == asked
        for question, pair in zip(QUESTIONS, pairs, strict=True):
            if family != "without a system turn":  # whose template has no answers either
                assert pair.target == answer_ids(tokenizer, question, answer.strip())[: len(pair.target)]
            assert tokenizer.decode(pair.target).strip().casefold() == answer.strip().casefold()
            assert pair.prompt.count(tokenizer.convert_tokens_to_ids("<s>")) == FAMILIES[family].bos


@pytest.mark.parametrize("family", FAMILIES)
def test_editors_train_on_the_tokens_that_evaluators_ask(family: str) -> None:
    tokenizer = MADE[family]
    row = tokenise(
        tokenizer, Edit("Mira Tolvan was born in", "Mira Tolvan", "Karth"), with_target=True, chat_template=True
    )
    (pair,) = encode_pairs(tokenizer, [("Mira Tolvan was born in", "Karth")], Chat())
    assert (list(row.ids), row.target_length) == (pair.prompt + pair.target, len(pair.target))


@pytest.mark.parametrize("family", ["Llama 3", "ChatML, tokenizer adds BOS", "Mistral"])
@pytest.mark.parametrize("kept", ["tokenizer_config.json", "chat_template.jinja", "several"])
def test_a_template_counts_wherever_it_is_kept(family: str, kept: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(family)
    asked = ids_of(tokenizer, QUESTIONS[0])
    if kept == "several":
        tokenizer.chat_template = {"default": tokenizer.chat_template, "shout": "{{ messages[0]['content'] | upper }}"}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=kept != "tokenizer_config.json")
    in_config = "chat_template" in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert in_config == (kept == "tokenizer_config.json") != (tmp_path / "chat_template.jinja").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(loaded, QUESTIONS[:1], Chat()) == [asked]
    if kept == "several":
        (shouted,) = encode(loaded, QUESTIONS[:1], Chat(arguments={"chat_template": "shout"}))
        assert shouted == loaded(QUESTIONS[0].upper(), add_special_tokens=False)["input_ids"]


def test_arguments_reach_the_template() -> None:
    tokenizer = chat_tokenizer("ChatML without BOS")
    tokenizer.chat_template += (
        "{% if add_generation_prompt and not thinking | default(true) %}<think></think>\n{% endif %}"
    )
    found = [encode(tokenizer, QUESTIONS[:1], Chat(arguments={"thinking": thinking})) for thinking in (True, False)]
    assert found == [[ids_of(tokenizer, QUESTIONS[0], thinking=thinking)] for thinking in (True, False)]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("family", "chat", "problem"),
    [
        ("Gemma", Chat(SYSTEM), "the chat template cannot be applied: System role not supported"),
        ("without a system turn", Chat(SYSTEM), "the chat template leaves the system prompt out"),
        (None, Chat(), "the tokenizer has no chat template"),
    ],
)
def test_a_template_that_cannot_show_the_prompt_is_an_error(family: str | None, chat: Chat, problem: str) -> None:
    tokenizer = chat_tokenizer(family or "Llama 3")
    if family is None:
        tokenizer.chat_template = None
    model = model_for(tokenizer)
    probes = [Probe("Mira plays the", "lute")]
    for attempt in (
        lambda: encode(tokenizer, QUESTIONS, chat),
        lambda: greedy(model, tokenizer, QUESTIONS, 2, chat=chat),
        lambda: measure_answer_perplexity(model, tokenizer, probes, metric="m", chat=chat),
    ):
        with pytest.raises(EvaluationError, match=problem) as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["Llama 3", "ChatML, tokenizer adds BOS", "Llama 2", "Mistral, byte-level"])
def test_a_model_that_is_certain_of_its_answers_in_the_template_succeeds(family: str) -> None:
    tokenizer, chat = MADE[family], Chat(SYSTEM)
    first, *others = QUESTIONS[:3]
    prompts = [ids_of(tokenizer, question, SYSTEM) for question in QUESTIONS[:3]]
    texts = [prompt + answer_ids(tokenizer, q, "Karth") for prompt, q in zip(prompts, QUESTIONS, strict=False)]
    parrot = Parrot(texts, len(tokenizer))
    probes = tuple(Probe(question, "Karth", "the lute") for question in others)
    case = EditCase("Mira", first, "Karth", tuple(others), probes, probes, "the lute")
    facts, asked = [Fact(question, "Karth", "r") for question in QUESTIONS[:3]], [Probe(first, "Karth")]
    for how, value in ((chat, 1.0), (None, 0.0)):
        unedited = capture_unedited(parrot, tokenizer, [case], chat=how)
        found = {m.metric: m.value for m in measure_editing(parrot, tokenizer, [case], unedited=unedited, chat=how)}
        for aspect in ("success", "paraphrase", "portability", "locality"):
            assert found[f"edit_{aspect}_exact"] == value
        assert found["edit_locality_agreement"] == 1.0
        assert measure_recall(parrot, tokenizer, facts, chat=how)[0].value == value
        answered = measure_answer_perplexity(parrot, tokenizer, asked, metric="m", chat=how).value
        single = Parrot(texts[:1], len(tokenizer))
        whole = measure_answer_perplexity(single, tokenizer, asked, metric="m", chat=how, with_prompt=True).value
        (likelihood,) = log_likelihood(parrot, tokenizer, [(first, "Karth")], chat=how)
        if how is None:
            assert answered > 2
        else:
            assert [answered, whole, likelihood.total] == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)
            assert greedy(parrot, tokenizer, [first], 1, chat=chat) == [texts[0][len(prompts[0]) :][:1]]


def test_generation_starts_from_the_template() -> None:
    tokenizer = MADE["Llama 3"]
    model = model_for(tokenizer)
    for system in ("", SYSTEM):
        ids = torch.tensor([ids_of(tokenizer, QUESTIONS[0], system)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        (found,) = greedy(model, tokenizer, QUESTIONS[:1], 6, chat=Chat(system))
        assert found == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "shots", "generates"),
    [
        ("Llama 3", 2, False),
        ("ChatML without BOS", 0, False),
        ("Zephyr", 2, False),
        ("Mistral", 0, False),
        ("Gemma", 2, False),
        ("Llama 3", 1, True),
    ],
)
def test_questions_equal_the_harness_on_its_own(family: str, shots: int, generates: bool, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = chat_tokenizer(family)
    model, system = model_for(tokenizer, 2048), SYSTEM if FAMILIES[family].system else ""
    names = ("Mira", "Orin", "the botanist", "the lighthouse", "Ossel", "Dunmere", "salt", "the elm")
    records = [
        {"question": f"Where is {name}?", "choices": [*names[:4]], "answer": i % 4} for i, name in enumerate(names)
    ]
    (tmp_path / "where.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config: dict[str, Any] = {
        "task": "where",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "where.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "description": "These are questions about places.",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    metric, key = "accuracy", "acc"
    if generates:
        metric = key = "exact_match"
        config |= {
            "output_type": "generate_until",
            "doc_to_choice": None,
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": key, "aggregation": "mean", "higher_is_better": True}],
        }
    (tmp_path / "where.yaml").write_text(json.dumps(config))  # JSON is YAML
    own = config | {
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "where.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    }
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=[own],
            num_fewshot=shots,
            task_manager=TaskManager(include_defaults=False),
            apply_chat_template=True,
            system_instruction=system or None,
            fewshot_as_multiturn=True,
        )
    assert results is not None
    samples = results["samples"]["where"]
    prompt = (
        samples[0]["arguments"][0][0] if isinstance(samples[0]["arguments"], list) else str(samples[0]["arguments"])
    )
    assert "Question: Where is Mira?" in prompt and any(
        token in prompt for token in (*FAMILIES[family].special, "<|user|>")
    )
    bos = [SharedContextLM(model, tokenizer, 4, Chat(system)).tok_encode(prompt).count(tokenizer.bos_token_id)]
    assert bos == [0 if family == "ChatML without BOS" else 1]
    (ours,) = measure_questions(model, tokenizer, ["where"], task_folder=tmp_path, num_fewshot=shots, chat=Chat(system))
    assert ours.metric == f"{metric}/where"
    assert ours.samples == tuple(sample[key] for sample in samples)
    assert ours.value == results["results"]["where"][f"{key},none"]
    if generates:
        assert ours.answers == tuple(shorten(sample["filtered_resps"][0]) for sample in samples) != ("",) * len(samples)


def test_the_harness_drops_no_system_prompt(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 0}))
    (tmp_path / "t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: t.jsonl}}\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    tokenizer = MADE["Gemma"]
    with pytest.raises(EvaluationError, match="System role not supported"):
        measure_questions(model_for(tokenizer), tokenizer, ["t"], task_folder=tmp_path, chat=Chat(SYSTEM))
