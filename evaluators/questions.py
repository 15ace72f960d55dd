"""Multiple-choice questions through lm-evaluation-harness: accuracy by task, outcome by question."""

from __future__ import annotations

import io
import logging
import math
import random
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from evaluators.harness import SharedContextLM
from evaluators.measurement import EvaluationError, Measurement
from evaluators.question_tasks import load_tasks
from evaluators.state import borrowed

_FEWSHOT_SEED = 1234  # the harness's own default, so that few-shot prompts are the same as its


def measure_questions(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: Path,
    batch_size: int = 32,
    limit: int | None = None,
    num_fewshot: int | None = None,
    lower_is_better: AbstractSet[str] = frozenset(),
    options: int | None = 4,
) -> list[Measurement]:
    """Measure `accuracy/<task>` of each task, in the order asked for; samples are 1 or 0 by question.

    Tasks are YAML files of `task_folder` (see `evaluators.question_tasks.load_tasks`). `limit` takes
    the first questions of each task, `num_fewshot` overrides a task that leaves it open. The tasks
    in `lower_is_better` are those whose knowledge should be gone; for the others the harness says
    which way is better. Model and tokenizer are left as found.

    Raises EvaluationError for no or unknown tasks, broken data and likelihoods that are NaN.
    """
    if not tasks:
        raise EvaluationError("questions: no tasks to measure; name at least one")
    if unknown := sorted(lower_is_better - set(tasks)):
        raise EvaluationError(f"questions: lower_is_better names {', '.join(unknown)}, which is not measured")
    if limit is not None and limit < 1:
        raise EvaluationError(f"questions: limit is {limit}; it must be at least 1, or None for all questions")
    with _contained(), borrowed(model, tokenizer):
        loaded = load_tasks(tasks, Path(task_folder), options)
        for task in loaded.values():
            if task.get_config("num_fewshot") is None or num_fewshot is not None:
                task.set_config("num_fewshot", num_fewshot or 0)
            task.set_fewshot_seed(_FEWSHOT_SEED)
        lm = SharedContextLM(model, tokenizer, batch_size)
        # `evaluate` and not `simple_evaluate`: that one seeds every generator of the process, asks
        # the hub for the model's revision and collects the environment.
        results = evaluate(lm, {"tasks": loaded, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0)
    measurements = []
    for name in tasks:
        if "acc" not in results["higher_is_better"][name]:
            raise EvaluationError(f"questions: task {name} has no metric 'acc'; it must be multiple_choice")
        better = name not in lower_is_better and bool(results["higher_is_better"][name]["acc"])
        fewshot = loaded[name].get_config("num_fewshot")
        measurements.append(
            Measurement.mean(
                f"accuracy/{name}",
                _outcomes(name, results["samples"][name]),
                higher_is_better=better,
                note=f"lm-eval acc, {fewshot}-shot, by summed log-likelihood of the choices",
            )
        )
    return measurements


def pool(metric: str, measurements: Sequence[Measurement]) -> Measurement:
    """Pool the samples of several measurements into one, `metric`: every question counts the same.

    Raises EvaluationError for none, or for measurements of opposite directions.
    """
    directions = {m.higher_is_better for m in measurements}
    if len(directions) != 1:
        what = "nothing to pool" if not measurements else "some measurements are better high, others low"
        raise EvaluationError(f"{metric}: {what}")
    samples = [sample for m in measurements for sample in m.samples]
    note = "pooled over " + ", ".join(m.metric for m in measurements)
    return Measurement.mean(metric, samples, higher_is_better=directions.pop(), note=note)


def _outcomes(task: str, samples: Sequence[dict[str, Any]]) -> list[float]:
    """Return acc by question, in the order of the documents."""
    for sample in samples:
        # The harness takes the argmax, to which a NaN is the largest: it would count as an answer.
        if any(math.isnan(likelihood) for likelihood, _ in sample["filtered_resps"]):
            raise EvaluationError(
                f"{task}, question {sample['doc_id']}: the likelihoods of the choices are NaN; "
                "the model's weights are broken"
            )
    return [float(sample["acc"]) for sample in sorted(samples, key=lambda s: s["doc_id"])]


@contextmanager
def _contained() -> Iterator[None]:
    """Keep the harness's log, progress bars and random draws to itself while it works."""
    log = logging.getLogger("lm_eval")
    level = log.level
    drawn = random.getstate()  # the harness draws task ids from the process's generator
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        random.setstate(drawn)
