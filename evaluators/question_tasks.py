"""Question tasks of lm-evaluation-harness: YAML files in a folder first, its own table after that."""

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
    """Return what each of `names` stands for, in that order: its tasks by name.

    A task stands for itself; a group or a tag for all tasks in it. Names are those of the YAML
    files of `folder`, and where none has it, those of the harness itself, whose data come from the
    hub. A task of the folder with `dataset_path: json` names its `data_files` relative to its YAML
    file. They are read into memory here: nothing is cached beside the data, and a changed file is
    seen at once.

    Raises EvaluationError for an unknown name (with near ones), for data that cannot be loaded, for a
    question of the folder that has not `options` choices (None: any number) or no valid answer, and
    for a folder whose files would run code, unless `trust_code`.
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
    """Return the harness's own tasks: fourteen thousand, which take 12 to 22 s to index, so once a process."""
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
        # Whatever data sets raise, from a missing network to a moved repository.
        raise EvaluationError(
            f"question task {name!r}: its data cannot be loaded ({type(error).__name__}: {error}); "
            "they come from the Hugging Face hub, or from its cache where there is no network"
        ) from error
    return tasks


def _local(name: str, manager: Any, options: int | None, overrides: Record) -> Iterator[tuple[str, Any]]:
    """Yield the tasks that a name of the folder stands for; a group's entries may override settings of a task."""
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
                f"{entry.yaml_path}: group {name} lists {child!r}, which is no task or group of its folder"
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
    except (EvaluationError, TemplateError):  # a template is the caller's to explain
        raise
    except Exception as error:  # whatever the harness makes of a key that it does not know, or of a wrong value
        reason = " ".join(str(error).split())
        raise EvaluationError(f"{yaml}: task {name} cannot be loaded: {type(error).__name__}: {reason}") from error


def _check_metrics(name: str, yaml: Path, config: Record) -> None:
    """Raise EvaluationError for a metric that the harness does not have: it would fetch its code by that name."""
    metrics = config.get("metric_list") or ()
    for metric in (entry.get("metric") for entry in metrics if isinstance(entry, Mapping)):
        if isinstance(metric, str) and metric not in metric_registry and config.get("process_results") is None:
            known = ", ".join(metric_registry.keys())
            raise EvaluationError(f"{yaml}: task {name}: unknown metric {metric!r}. Known: {known}.")


def _asks_choices(config: Record) -> bool:
    """Say whether a task has the plain form: fields `question`, `choices` and `answer`, the index of a choice."""
    return (
        config.get("output_type") == "multiple_choice"
        and config.get("doc_to_choice") == "choices"
        and config.get("doc_to_target") == "answer"
    )


Check = Callable[[Record, Record, str], None]


def _reader(name: str, yaml: Path, dataset_kwargs: Any, check: Check) -> Callable[..., dict[str, Dataset]]:
    """Return a function that gives the task's splits; the harness calls it with metadata of its own."""
    files = (dataset_kwargs or {}).get("data_files")
    if not isinstance(files, Mapping):
        raise EvaluationError(f"{yaml}: task {name} needs dataset_kwargs.data_files, a map of split to file")
    splits = {split: _read(yaml.parent / file, check) for split, file in files.items()}

    def read(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list(records) for split, records in splits.items()}

    return read


def _read(file: Path, check: Check) -> list[Record]:
    """Read a JSON Lines file of questions and check each record."""
    if not file.is_file():
        raise EvaluationError(f"questions: there is no file {file.resolve()}")
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
        raise EvaluationError(f"{file}: no questions; the file is empty")
    return records


def _check_fields(record: Record, first: Record, where: str) -> None:
    """Check that a record has the fields of the first: a missing one would be read as the text None."""
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
            raise EvaluationError(f"{where}: 'choices' must be a list of texts that are not empty")
        if len(choices) < 2 or (options is not None and len(choices) != options):
            must = "at least 2" if options is None else options
            raise EvaluationError(f"{where}: {len(choices)} choices where every question must have {must}")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise EvaluationError(f"{where}: 'answer' is {answer!r}; it must be the index of a choice, from 0")

    return check
