"""Accuracy on the question tasks of a run, per task and per pool."""

from __future__ import annotations

from typing import Any

from evaluators.data import EvaluationData
from evaluators.measurement import Measurement
from evaluators.settings import QuestionSettings


def evaluate(model: Any, tokenizer: Any, settings: QuestionSettings, data: EvaluationData) -> list[Measurement]:
    """Measure all question tasks in one run of the harness, then pool them; pools come first."""
    names = list(dict.fromkeys([*(name for names in data.pools.values() for name in names), *settings.tasks]))
    if not names:
        return []
    from evaluators.questions import measure_questions, pool  # lm-evaluation-harness takes seconds to import

    single = measure_questions(
        model,
        tokenizer,
        names,
        task_folder=data.task_folder,
        batch_size=data.batch_size,
        limit=settings.question_limit,
        num_fewshot=settings.num_fewshot,
        lower_is_better={name for pool in data.hazardous for name in data.pools[pool]},
        options=settings.options,
        trust_code=data.trust_code,
        chat=data.chat,
    )
    by_name = {m.metric.partition("/")[2]: m for m in reversed(single)}
    pools = {
        f"accuracy/{name}": pool(f"accuracy/{name}", [by_name[task] for task in tasks])
        for name, tasks in data.pools.items()
        if tasks
    }
    return [*pools.values(), *(m for m in single if m.metric not in pools)]
