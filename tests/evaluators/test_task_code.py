"""Task files of strangers: what would run code is refused, templates are filled in inside a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluators import EvaluationError, measure_questions
from evaluators.task_code import refuse_code

SHIPPED = Path(__file__).parents[2] / "compositions" / "tinyworld" / "tasks"
QUESTION = {"question": "Where is it?", "choices": ["here", "there"], "answer": 1}
TASK = """\
task: odd
dataset_path: json
dataset_kwargs: {data_files: {test: odd.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")

def process(docs):
    return docs

class Task:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one task, with a module whose import leaves a mark."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "odd.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION) + "\n")
    (tasks / "odd.yaml").write_text(TASK)
    (tasks / "helper.py").write_text(CODE.format(marker=str(tmp_path / "mark")))
    return tasks


def ask(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    return measure_questions(model, tokenizer, ["odd"], task_folder=folder, options=None, **options)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("process_docs: !function helper.process\n", "!function helper.process runs code"),
        ("custom_dataset: !function helper.process\n", "!function helper.process"),
        ("process_results: !function os.system\n", "!function os.system"),
        ("class: !function helper.Task\n", "!function helper.Task"),
        ("fewshot_config: {samples: !function helper.process}\n", "!function"),
        ("filter_list: [{name: f, filter: [{function: custom, filter_fn: !function helper.process}]}]\n", "!function"),
        ("metadata: {hook: !function helper.process}\n", "!function"),
        ("process_docs: !!python/name:os.system\n", "python/name:os.system runs code"),
        ("process_docs: !!python/object/apply:os.system [id]\n", "python/object/apply:os.system runs code"),
        ("process_docs: !anything x\n", "!anything x runs code"),
        ("unsafe_code: true\n", "unsafe_code runs what the model writes"),
        ("use_prompt: promptsource:all\n", "use_prompt imports"),
        ("other: {dataset_kwargs: {trust_remote_code: true}}\n", "trust_remote_code runs the dataset's own code"),
        ("metrics: [{metric: x, hf_evaluate: true}]\n", "hf_evaluate downloads"),
        ("include: shared\n", "shared: line 1: !function helper.process"),
        ("include: [plain, shared]\n", "shared: line 1: !function"),
        ("include: ../elsewhere.yaml\n", "elsewhere.yaml: line 1: !function"),
        ("x: &x {include: shared}\n<<: *x\n", "shared: line 1: !function"),
        ("x: &x [{a: 1}, {include: shared}]\n<<: *x\n", "shared: line 1: !function"),
        ("? [a, b]\n: !function helper.process\n", "!function helper.process"),
    ],
)
def test_a_folder_that_would_run_code_is_refused_and_nothing_ran(folder: Path, lines: str, message: str) -> None:
    (folder / "odd.yaml").write_text(TASK + lines)
    (folder / "plain").write_text("num_fewshot: 0\n")
    (folder / "shared").write_text("process_docs: !function helper.process\n")
    (folder.parent / "elsewhere.yaml").write_text("process_docs: !function tasks/helper.process\n")
    with pytest.raises(EvaluationError) as error:
        refuse_code(folder)
    assert message in str(error.value)
    assert "world.trust_code=true" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder.parent / "mark").exists()


def test_groups_and_tasks_below_that_nobody_asks_for_count_too(folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "group.yaml").write_text("group: g\ntask: [{task: odd, process_docs: !function a.b}]\n")
    with pytest.raises(EvaluationError, match=r"group\.yaml: line 2: !function a\.b"):
        refuse_code(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("a: 1\n---\nb: 2\n", "not YAML"), ("include: absent\n", "absent: cannot be read")],
)
def test_files_that_cannot_be_read_are_named(folder: Path, text: str, message: str) -> None:
    (folder / "odd.yaml").write_text(text)
    with pytest.raises(EvaluationError, match=message) as error:
        refuse_code(folder)
    assert "\n" not in str(error.value)


def test_the_embedded_tasks_and_plain_ones_need_no_trust(folder: Path) -> None:
    refuse_code(SHIPPED)
    (folder / "odd.yaml").write_text(TASK + "unsafe_code: false\ninclude: odd.yaml\nx: &x {y: *x}\n")
    refuse_code(folder)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_code_runs_with_trust_alone(folder: Path, model: Any, tokenizer: Any) -> None:
    (folder / "odd.yaml").write_text(TASK + "process_docs: !function helper.process\n")
    with pytest.raises(EvaluationError, match="!function"):
        ask(model, tokenizer, folder)
    assert not (folder.parent / "mark").exists()
    assert ask(model, tokenizer, folder, trust_code=True)[0].n == 2
    assert (folder.parent / "mark").exists()


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "runs code"),
        ("{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}", "runs code"),
        ("{{ lipsum.__globals__['os'].system('touch MARK') }}", "runs code"),
        ("{{ '{0.__class__}'.format(question) }}", None),  # what is refused in there is left out
        ("{{ question", "cannot be rendered"),
        ("{{ question | nofilter }}", "cannot be rendered"),
    ],
)
def test_templates_cannot_reach_code(
    folder: Path, model: Any, tokenizer: Any, template: str, message: str | None
) -> None:
    mark = folder.parent / "mark"
    task = TASK.replace('"{{question}}"', json.dumps(template.replace("MARK", str(mark))))
    (folder / "odd.yaml").write_text(task)
    if message is None:
        with pytest.raises(EvaluationError):
            ask(model, tokenizer, folder)
    else:
        with pytest.raises(EvaluationError, match=message) as error:
            ask(model, tokenizer, folder)
        assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_templates_are_for_still_works_and_trust_lifts_the_sandbox(
    folder: Path, model: Any, tokenizer: Any
) -> None:
    plain = "{% set q = question.strip() %}{{ q | upper | regex_replace('E', 'e') }} {{ choices | join(', ') }}"
    (folder / "odd.yaml").write_text(TASK.replace('"{{question}}"', json.dumps(plain)))
    sandboxed, free = (ask(model, tokenizer, folder, trust_code=trust) for trust in (False, True))
    assert [m.samples for m in sandboxed] == [m.samples for m in free]
    reaching = "{{ question.__class__.__name__ }}"
    (folder / "odd.yaml").write_text(TASK.replace('"{{question}}"', json.dumps(reaching)))
    assert ask(model, tokenizer, folder, trust_code=True)[0].n == 2


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("metric_list: [{metric: stranger/metric}]\n", "unknown metric 'stranger/metric'. Known: .*acc"),
        ("output_type: guess\n", "task odd cannot be loaded: ValueError"),
        ("nonsense: 3\n", "task odd cannot be loaded: TypeError"),
        ("filter_list: [{name: f, filter: [{function: nobody}]}]\n", "task odd cannot be loaded: KeyError"),
    ],
)
def test_what_the_harness_cannot_take_is_one_line(
    folder: Path, model: Any, tokenizer: Any, lines: str, message: str
) -> None:
    key = lines.partition(":")[0]
    kept = "".join(line for line in TASK.splitlines(keepends=True) if not line.startswith(f"{key}:"))
    (folder / "odd.yaml").write_text(kept + lines)
    with pytest.raises(EvaluationError, match=message) as error:
        ask(model, tokenizer, folder)
    assert "\n" not in str(error.value)
