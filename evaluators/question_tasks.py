"""Load question tasks of lm-evaluation-harness, from a folder of YAML files or its own collection."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # the only reader that knows `include` and `!function`

from evaluators.measurement import EvaluationError
from evaluators.task_code import refuse_code

Record = dict[str, Any]
Tasks = dict[str, Any]


def load_tasks(
    names: Sequence[str], folder: Path | None, options: int | None, *, trust_code: bool = False
) -> dict[str, Tasks]:
    """Return the tasks of each of `names`, which may be tasks, groups or tags, by name.

    Names are looked up in the YAML files of `folder`, then in the harness itself, whose data come from
    the hub. The `data_files` of a task with `dataset_path: json` are relative to its YAML file. They
    are read into memory, not cached, so changes take effect at once.

    Raises EvaluationError for an unknown name, for data that cannot be loaded, for a question in the
    folder without `options` choices (None: any number) or a valid answer, and for a folder whose files
    would run code, unless `trust_code`.
    """
    local: Any = None
    if folder is not None:
        if not folder.is_dir():
            raise EvaluationError(f"question tasks: {folder} is not a folder; give the folder of the task YAML files")
        if not trust_code:
            refuse_code(folder)
        local = TaskManager(include_path=str(folder), include_defaults=False)
    found = {}
    for name in names:
        if local is not None and name in local.all_tasks:
            found[name] = dict(_local(name, local, options, {}))
        elif name in harness_tasks().all_tasks:
            found[name] = _of_the_harness(name)
        else:
            raise EvaluationError(_unknown(name, [] if local is None else local.all_tasks, folder))
    return found


@cache
def harness_tasks() -> Any:
    """Return the harness's own tasks; indexing the 14,000 tasks takes 12 to 22 s."""
    return TaskManager()


def _unknown(name: str, local: Sequence[str], folder: Path | None) -> str:
    near = [
        *difflib.get_close_matches(name, local, n=3, cutoff=0.4),
        *difflib.get_close_matches(name, harness_tasks().all_tasks, n=3, cutoff=0.8),
    ]
    hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    has = "" if folder is None else f" {folder} has: {', '.join(local) or 'none'}"
    return f"unknown question task {name!r}.{hint} lm-evaluation-harness has none of that name.{has}"


def _of_the_harness(name: str) -> Tasks:
    try:
        tasks: Tasks = harness_tasks().load([name])["tasks"]
    except Exception as error:
        # Datasets raise many kinds of errors, from a missing network to a moved repository.
        raise EvaluationError(
            f"question task {name!r}: its data cannot be loaded from the Hugging Face hub or its cache "
            f"({type(error).__name__}: {error})"
        ) from error
    return tasks


def _local(name: str, manager: Any, options: int | None, overrides: Record) -> Iterator[tuple[str, Any]]:
    """Yield the tasks of a name in the folder; groups may override settings of their tasks."""
    entry = manager.task_index[name]
    if name in manager.all_subtasks:
        yield _task(name, Path(entry.yaml_path), manager, options, overrides)
        return
    members: Sequence[Any] = sorted(entry.tags)
    if name in manager.all_groups:
        listed = load_yaml(entry.yaml_path)["task"]
        members = listed if isinstance(listed, list) else [listed]
    for member in members:
        own = member if isinstance(member, dict) else {"task": member}
        child = own.get("task", own.get("group"))
        if not isinstance(child, str) or child not in manager.all_tasks:
            raise EvaluationError(
                f"{entry.yaml_path}: group {name} lists {child!r}, which is not a task or group in its folder"
            )
        settings = {key: value for key, value in own.items() if key not in ("task", "group", "task_alias")}
        yield from _local(child, manager, options, {**overrides, **settings})


def _task(name: str, yaml: Path, manager: Any, options: int | None, overrides: Record) -> tuple[str, Any]:
    config = load_yaml(yaml) | overrides
    if config.get("dataset_path") == "json":
        check = _check_choices(options) if _asks_choices(config) else _check_fields
        config["custom_dataset"] = _reader(name, yaml, config.pop("dataset_kwargs", None), check)
    _check_metrics(name, yaml, config)
    try:
        return name, manager.load([config])["tasks"][name]
    except (EvaluationError, TemplateError):  # the caller explains template errors
        raise
    except Exception as error:  # the harness raises many kinds for unknown keys and wrong values
        reason = " ".join(str(error).split())
        raise EvaluationError(f"{yaml}: task {name} cannot be loaded: {type(error).__name__}: {reason}") from error


def _check_metrics(name: str, yaml: Path, config: Record) -> None:
    """Raise EvaluationError for an unknown metric, whose code the harness would download."""
    metrics = config.get("metric_list") or ()
    for metric in (entry.get("metric") for entry in metrics if isinstance(entry, Mapping)):
        if isinstance(metric, str) and metric not in metric_registry and config.get("process_results") is None:
            known = ", ".join(metric_registry.keys())
            raise EvaluationError(f"{yaml}: task {name}: unknown metric {metric!r}. Known: {known}.")


def _asks_choices(config: Record) -> bool:
    """Return whether a task has the fields `question`, `choices` and `answer` (index of a choice)."""
    return (
        config.get("output_type") == "multiple_choice"
        and config.get("doc_to_choice") == "choices"
        and config.get("doc_to_target") == "answer"
    )


Check = Callable[[Record, Record, str], None]


def _reader(name: str, yaml: Path, dataset_kwargs: Any, check: Check) -> Callable[..., dict[str, Dataset]]:
    """Return a function that returns the task's splits, for the harness."""
    files = (dataset_kwargs or {}).get("data_files")
    if not isinstance(files, Mapping):
        raise EvaluationError(f"{yaml}: task {name} needs dataset_kwargs.data_files, a mapping from split to file")
    splits = {split: _read(yaml.parent / file, check) for split, file in files.items()}

    def read(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list(records) for split, records in splits.items()}

    return read


def _read(file: Path, check: Check) -> list[Record]:
    """Read a JSON Lines file of questions and check each record."""
    if not file.is_file():
        raise EvaluationError(f"questions: {file.resolve()} does not exist")
    records: list[Record] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise EvaluationError(f"{where}: a question must be a JSON object")
        check(record, records[0] if records else record, where)
        records.append(record)
    if not records:
        raise EvaluationError(f"{file}: no questions: the file is empty")
    return records


def _check_fields(record: Record, first: Record, where: str) -> None:
    """Check that a record has the fields of the first; the template would show a missing one as None."""
    for field in first:
        if field not in record or record[field] is None:
            raise EvaluationError(f"{where}: the field {field!r} is missing, which the first record has")


def _check_choices(options: int | None) -> Check:
    def check(record: Record, _: Record, where: str) -> None:
        for field in ("question", "choices", "answer"):
            if field not in record:
                raise EvaluationError(f"{where}: the field {field!r} is missing")
        choices, answer = record["choices"], record["answer"]
        if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
            raise EvaluationError(f"{where}: 'choices' must be a list of non-empty texts")
        if len(choices) < 2 or (options is not None and len(choices) != options):
            must = "at least 2" if options is None else options
            raise EvaluationError(f"{where}: {len(choices)} choices; every question must have {must}")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise EvaluationError(f"{where}: 'answer' is {answer!r}; it must be the index of a choice, from 0")

    return check
