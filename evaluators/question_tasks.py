"""Local lm-evaluation-harness tasks: YAML files in a folder, questions in JSON files beside them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # the only reader that knows `include` and `!function`

from evaluators.measurement import EvaluationError

Record = dict[str, Any]


def load_tasks(names: Sequence[str], folder: Path, options: int | None) -> dict[str, Any]:
    """Return the tasks called `names` from the YAML files of `folder`, by name, in that order.

    A task with `dataset_path: json` names its `data_files` relative to its YAML file. They are read
    into memory here: nothing is cached beside the data, and a changed file is seen at once.
    Raises EvaluationError for an unknown task (with near names), and for a question that has not
    `options` choices (None: any number) or no valid answer.
    """
    if not folder.is_dir():
        raise EvaluationError(f"question tasks: {folder} is not a folder; give the folder of the task YAML files")
    # The harness's own fourteen thousand tasks take 12 to 22 s to index and are not wanted here.
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    known = manager.all_subtasks
    tasks = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise EvaluationError(f"unknown question task {name!r}.{hint} {folder} has: {', '.join(known) or 'none'}")
        yaml = Path(manager.task_index[name].yaml_path)
        config = load_yaml(yaml)
        if config.get("dataset_path") == "json":
            config["custom_dataset"] = _reader(name, yaml, config.pop("dataset_kwargs", None), options)
        tasks.update(manager.load([config])["tasks"])
    return tasks


def _reader(name: str, yaml: Path, dataset_kwargs: Any, options: int | None) -> Callable[..., dict[str, Dataset]]:
    """Return a function that gives the task's splits; the harness calls it with metadata of its own."""
    files = (dataset_kwargs or {}).get("data_files")
    if not isinstance(files, Mapping):
        raise EvaluationError(f"{yaml}: task {name} needs dataset_kwargs.data_files, a map of split to file")
    splits = {split: _read(yaml.parent / file, options) for split, file in files.items()}

    def read(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list(records) for split, records in splits.items()}

    return read


def _read(file: Path, options: int | None) -> list[Record]:
    """Read a JSON Lines file of questions and check each record."""
    if not file.is_file():
        raise EvaluationError(f"questions: there is no file {file.resolve()}")
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{file}, line {number}: not JSON ({error})") from error
        _check(record, f"{file}, line {number}", options)
        records.append(record)
    if not records:
        raise EvaluationError(f"{file}: no questions; the file is empty")
    return records


def _check(record: Any, where: str, options: int | None) -> None:
    if not isinstance(record, dict):
        raise EvaluationError(f"{where}: a question must be a JSON object")
    for field in ("question", "choices", "answer"):
        if field not in record:
            raise EvaluationError(f"{where}: the field {field!r} is missing")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise EvaluationError(f"{where}: 'choices' must be a list of texts that are not empty")
    if options is not None and len(choices) != options:
        raise EvaluationError(f"{where}: {len(choices)} choices where every question must have {options}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise EvaluationError(f"{where}: 'answer' is {answer!r}; it must be the index of a choice, from 0")
