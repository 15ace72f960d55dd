"""Accuracy on the question tasks of a run, by task and by pool. Imports the harness when it runs."""

from __future__ import annotations

from typing import Any

from evaluators.asked import Asked
from evaluators.measurement import Measurement
from evaluators.settings import QuestionSettings


def evaluate(model: Any, tokenizer: Any, settings: QuestionSettings, asked: Asked) -> list[Measurement]:
    """Measure the tasks of all pools and the further ones at once, then pool them; pools stand first."""
    names = list(dict.fromkeys([*(name for names in asked.pools.values() for name in names), *settings.tasks]))
    if not names:
        return []
    from evaluators.questions import measure_questions, pool  # lm-evaluation-harness takes seconds to import

    single = measure_questions(
        model,
        tokenizer,
        names,
        task_folder=asked.task_folder,
        batch_size=asked.batch_size,
        limit=settings.question_limit,
        num_fewshot=settings.num_fewshot,
        lower_is_better={name for pool in asked.hazardous for name in asked.pools[pool]},
        options=settings.options,
        trust_code=asked.trust_code,
    )
    by_name = {m.metric.partition("/")[2]: m for m in reversed(single)}
    pools = {
        f"accuracy/{name}": pool(f"accuracy/{name}", [by_name[task] for task in tasks])
        for name, tasks in asked.pools.items()
        if tasks
    }
    return [*pools.values(), *(m for m in single if m.metric not in pools)]
