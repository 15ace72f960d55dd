"""Accuracy on the question tasks of a run, per task and per pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from evaluators.data import EvaluationData
from evaluators.measurement import Measurement
from evaluators.settings import QuestionSettings

PARTS = (0.0, 0.125, 0.25, 0.5, 1.0)
"""Shares of the questions of each task after which a state may be decided, see `QuestionSettings.sequential`."""


def evaluate(model: Any, tokenizer: Any, settings: QuestionSettings, data: EvaluationData) -> list[Measurement]:
    """Measure all question tasks in one run of the harness, then pool them; pools come first."""
    names = list(dict.fromkeys([*(name for names in data.pools.values() for name in names), *settings.tasks]))
    if not names:
        return []
    if not settings.sequential:
        return _measured(model, tokenizer, settings, data, names, None)
    found: dict[str, Measurement] = {}
    for part in pairwise(PARTS):
        for new in _measured(model, tokenizer, settings, data, names, part):
            found[new.metric] = found[new.metric].with_part(new) if new.metric in found else new
        if data.enough is not None and data.enough(tuple(found.values())):
            break
    return [
        replace(m, note=f"{m.note}; {m.n} of {m.total} questions, which decided the state") if m.n < m.total else m
        for m in found.values()
    ]


def _measured(
    model: Any,
    tokenizer: Any,
    settings: QuestionSettings,
    data: EvaluationData,
    names: Sequence[str],
    part: tuple[float, float] | None,
) -> list[Measurement]:
    """Measure tasks and pools, on a part of the questions if one is given."""
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
        part=part,
    )
    by_name = {m.metric.partition("/")[2]: m for m in reversed(single)}
    pools = {
        f"accuracy/{name}": pool(f"accuracy/{name}", [by_name[task] for task in tasks if task in by_name])
        for name, tasks in data.pools.items()
        if any(task in by_name for task in tasks)
    }
    return [*pools.values(), *(m for m in single if m.metric not in pools)]
