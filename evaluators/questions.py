"""Measure question tasks with lm-evaluation-harness, with one sample per question."""

from __future__ import annotations

import io
import logging
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.utils
import numpy as np
from jinja2 import TemplateError, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.evaluator import evaluate

from evaluators.encoding import encode
from evaluators.harness import SharedContextLM
from evaluators.measurement import EvaluationError, Measurement, shorten
from evaluators.question_tasks import load_tasks
from evaluators.state import borrowed
from interventions.tokens import Chat

_FEWSHOT_SEED = 1234  # the default of the harness, for equal few-shot prompts


def measure_questions(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    num_fewshot: int | None = None,
    lower_is_better: AbstractSet[str] = frozenset(),
    options: int | None = 4,
    trust_code: bool = False,
    chat: Chat | None = None,
    part: tuple[float, float] | None = None,
) -> list[Measurement]:
    """Measure each task, in the given order; samples are 1 or 0 per question.

    Names are looked up in `task_folder`, then in the harness, such as `mmlu` (see
    `evaluators.question_tasks.load_tasks`). A task scored by `acc` gives `accuracy/<task>`; others give
    their first metric under its name, such as `exact_match/<task>`, with `,<filter>` after the metric
    if there are several filters. A group or tag gives its pooled questions, then its tasks.

    `limit` uses the first questions of each task, `num_fewshot` overrides the tasks' setting, and
    `batch_size` is the number of sequences per pass. `lower_is_better` names the tasks with knowledge
    to unlearn; for the others the harness knows the direction. Model and tokenizer are not changed.

    With `chat`, the harness puts the questions into the chat template by its own rules: examples are turns of
    their own, a task's description goes into the system's turn, and choices follow the template at once.

    With `part`, only the questions between two shares of each task are asked, and a task without any is left out.

    With `trust_code`, task files may run code: functions, and templates without a sandbox. Tasks of the
    harness itself are always trusted, like any installed package.

    Broken logits give NaN samples. Raises EvaluationError for no or unknown tasks, broken data, tasks
    without a score per question, and task files that would run code.
    """
    if not tasks:
        raise EvaluationError("questions: no tasks to measure; name at least one")
    if unknown := sorted(lower_is_better - set(tasks)):
        raise EvaluationError(f"questions: lower_is_better names tasks that are not measured: {', '.join(unknown)}")
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise EvaluationError(f"questions: {name} is {value}; it must be at least {least}, or None")
    try:
        with _contained(), _templates(trusted=trust_code), borrowed(model, tokenizer):
            folder = None if task_folder is None else Path(task_folder)
            loaded = load_tasks(tasks, folder, options, trust_code=trust_code)
            leaves = {leaf: task for members in loaded.values() for leaf, task in members.items()}
            for leaf, task in leaves.items():
                if not len(task.eval_docs):
                    raise EvaluationError(f"questions: task {leaf} has no questions: its dataset is empty")
                if task.get_config("num_fewshot") is None or num_fewshot is not None:
                    task.set_config("num_fewshot", num_fewshot or 0)
                task.set_fewshot_seed(_FEWSHOT_SEED)
            asked: dict[str, range] | None = None
            if part is not None:
                parts = {leaf: _part(len(task.eval_docs), limit, part) for leaf, task in leaves.items()}
                asked = {leaf: places for leaf, places in parts.items() if places}
                leaves = {leaf: leaves[leaf] for leaf in asked}
                if not leaves:
                    return []
            if chat is not None:
                encode(tokenizer, ["a"], chat)  # the harness would drop a system prompt that the template refuses
            lm = SharedContextLM(model, tokenizer, batch_size, chat)
            # Not `simple_evaluate`, which seeds all random generators, queries the hub for the model's
            # revision and collects the environment.
            chosen = {"tasks": leaves, "groups": {}, "group_map": {}}
            results = evaluate(
                lm,
                chosen,
                limit=limit if asked is None else None,
                samples=asked,
                bootstrap_iters=0,
                system_instruction=(chat.system or None) if chat else None,
                apply_chat_template=chat is not None,
                fewshot_as_multiturn=chat is not None,
            )
    except UndefinedError as error:
        raise EvaluationError(f"questions: a template of {', '.join(tasks)} reads a missing field: {error}") from error
    except SecurityError as error:
        raise EvaluationError(
            f"questions: a template of {', '.join(tasks)} runs code: {error}; set world.trust_code=true if you trust it"
        ) from error
    except TemplateError as error:
        raise EvaluationError(f"questions: a template of {', '.join(tasks)} cannot be rendered: {error}") from error
    broken = lm.broken if asked is None else {(leaf, asked[leaf][place]) for leaf, place in lm.broken}
    falling = {leaf for name in lower_is_better for leaf in loaded[name]}
    single = {
        leaf: _measurements(leaf, task, results, broken, lower_is_better=leaf in falling)
        for leaf, task in leaves.items()
    }
    if part is not None:
        for leaf, measured in single.items():
            total = min(len(leaves[leaf].eval_docs), limit or sys.maxsize)
            single[leaf] = [m.part_of(total) for m in measured]
    found: dict[str, Measurement] = {}
    for name, all_members in loaded.items():
        members = [leaf for leaf in all_members if leaf in single]
        if not members:
            continue
        if list(all_members) != [name]:
            metrics = {m.metric.rpartition("/")[0] for leaf in members for m in single[leaf]}
            for kind in sorted(metrics):
                pooled = pool(
                    f"{kind}/{name}", [m for leaf in members for m in single[leaf] if m.metric == f"{kind}/{leaf}"]
                )
                found.setdefault(pooled.metric, pooled)
        for leaf in members:
            found |= {m.metric: m for m in single[leaf]}
    return list(found.values())


def pool(metric: str, measurements: Sequence[Measurement]) -> Measurement:
    """Pool the samples of several measurements with equal weights.

    Raises EvaluationError for no measurements and for opposite directions.
    """
    directions = {m.higher_is_better for m in measurements}
    if len(directions) != 1:
        what = "nothing to pool" if not measurements else "higher is better for some measurements, lower for others"
        raise EvaluationError(f"{metric}: {what}")
    samples = [sample for m in measurements for sample in m.samples]
    answers = [answer for m in measurements for answer in m.answers] if all(m.answers for m in measurements) else ()
    note = "pooled over " + ", ".join(m.metric for m in measurements)
    found = Measurement.mean(metric, samples, higher_is_better=directions.pop(), note=note, answers=answers)
    total = sum(m.total for m in measurements)
    return found.part_of(total) if total else found


def _part(questions: int, limit: int | None, part: tuple[float, float]) -> range:
    """Return the places of the questions of a task between two shares of it; the first part has at least one."""
    n = min(questions, limit or questions)
    return range(math.ceil(n * part[0]), math.ceil(n * part[1]))


def _measurements(
    name: str, task: Any, results: Any, broken: AbstractSet[tuple[str, int]], *, lower_is_better: bool
) -> list[Measurement]:
    """Return the measurements of one task: its first metric for each filter."""
    directions = results["higher_is_better"][name]
    metric = "acc" if "acc" in directions else next(iter(directions), None)
    by_filter: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in results["samples"][name]:
        by_filter[sample["filter"]].append(sample)
    fewshot, better = task.get_config("num_fewshot"), bool(directions.get(metric)) and not lower_is_better
    how = "by summed log-likelihood of the choices" if task.OUTPUT_TYPE == "multiple_choice" else "on generated text"
    measurements = []
    for label, chosen in by_filter.items():
        kind = "accuracy" if metric == "acc" else str(metric)
        kind += f",{label}" if len(by_filter) > 1 else ""
        note = f"lm-eval {metric}, {fewshot}-shot, {how}"
        outcomes = _outcomes(name, task, metric, chosen, broken)
        answers = [_answer(task, sample) for sample in sorted(chosen, key=lambda s: s["doc_id"])]
        measurements.append(
            Measurement.mean(f"{kind}/{name}", outcomes, higher_is_better=better, note=note, answers=answers)
        )
    return measurements


def _answer(task: Any, sample: dict[str, Any]) -> str:
    """Return the model's answer to a question: its most likely choice, or the generated text."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE != "multiple_choice":
        return shorten(str(responses[0])) if responses else ""
    likeliest = max(range(len(responses)), key=lambda i: responses[i][0])
    arguments = sample["arguments"]
    return shorten(str(arguments[likeliest][1])) if likeliest < len(arguments) else ""


def _outcomes(
    name: str,
    task: Any,
    metric: str | None,
    samples: Sequence[dict[str, Any]],
    broken: AbstractSet[tuple[str, int]],
) -> list[float]:
    """Return the metric per question, in the order of the documents; NaN for `broken` ones."""
    outcomes = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        where = f"{name}, question {sample['doc_id']}"
        if (name, sample["doc_id"]) in broken:
            outcomes.append(math.nan)
            continue
        if task.OUTPUT_TYPE == "multiple_choice":
            gold, choices = sample["target"], len(sample["filtered_resps"])
            if type(gold) is int and not 0 <= gold < choices:
                raise EvaluationError(f"{where}: the answer is choice {gold} (from 0), but there are {choices} choices")
        value = None if metric is None else sample.get(metric)
        if not isinstance(value, bool | int | float | np.number):
            raise EvaluationError(
                f"questions: task {name} has no score per question ({metric or 'no metric'}); "
                "use measure_perplexity for running text"
            )
        outcomes.append(float(value))
    return outcomes


@contextmanager
def _templates(*, trusted: bool) -> Iterator[None]:
    """Make the harness render templates in a sandbox, unless they are trusted."""
    own = lm_eval.utils.env
    chosen = own.overlay()
    if not trusted:
        chosen = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
        chosen.filters.update(own.filters)
    vars(chosen)["from_string"] = cache(chosen.from_string)  # the harness compiles a template again for each question
    lm_eval.utils.env = chosen
    try:
        yield
    finally:
        lm_eval.utils.env = own


@contextmanager
def _contained() -> Iterator[None]:
    """Silence the harness's log and progress bars, and restore the random state that it uses."""
    log = logging.getLogger("lm_eval")
    level = log.level
    drawn = random.getstate()  # the harness draws task ids with it
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        random.setstate(drawn)
