"""Run the evaluators of a recipe on a model state. Imports torch with the first measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluators import EditCase, Fact, Measurement, Probe, measure_editing, measure_perplexity, measure_recall
from evaluators import capture_unedited as _capture
from pytest_lmcompose.data import RunData
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from pytest_lmcompose.world import EditRecord, FactRecord

if TYPE_CHECKING:
    from evaluators import UneditedAnswers

NEIGHBOURS = "recall_same_subject"


def capture_unedited(model: Any, tokenizer: Any, data: RunData, evaluate: EvaluateSettings) -> UneditedAnswers | None:
    """Record the base model's answers to the locality prompts, or None where editing is not measured."""
    if not (evaluate.editing and data.edits):
        return None
    return _capture(model, tokenizer, edit_cases(data.edits), batch_size=evaluate.batch_size)


def measure_state(
    model: Any,
    tokenizer: Any,
    data: RunData,
    world: WorldSettings,
    evaluate: EvaluateSettings,
    unedited: UneditedAnswers | None,
) -> list[Measurement]:
    """Measure everything that the recipe asks for and the world has data for.

    The edits of the run are measured on every state, edited or not: on the base model they give
    the rates to compare with.
    """
    size = evaluate.batch_size
    found: list[Measurement] = []
    if evaluate.editing and data.edits:
        found += measure_editing(model, tokenizer, edit_cases(data.edits), unedited=unedited, batch_size=size)
    if evaluate.recall and data.facts:
        found += measure_recall(model, tokenizer, recall_facts(data.facts), batch_size=size)
    if evaluate.recall and data.neighbours:
        pooled = measure_recall(model, tokenizer, recall_facts(data.neighbours), batch_size=size)[0]
        found.append(dataclasses.replace(pooled, metric=NEIGHBOURS))
    if evaluate.perplexity and data.perplexity:
        found.append(measure_perplexity(model, tokenizer, data.perplexity, window=evaluate.window, batch_size=size))
    if evaluate.questions and data.tasks is not None and world.pools:
        found += _questions(model, tokenizer, data, world, evaluate)
    return found


def _questions(
    model: Any, tokenizer: Any, data: RunData, world: WorldSettings, evaluate: EvaluateSettings
) -> list[Measurement]:
    """Measure the tasks of all pools at once, then pool them."""
    from evaluators import measure_questions, pool  # lm-evaluation-harness takes seconds to import

    assert data.tasks is not None
    tasks = list(dict.fromkeys(task for tasks in world.pools.values() for task in tasks))
    hazardous = {task for name in world.hazardous for task in world.pools[name]}
    single = measure_questions(
        model,
        tokenizer,
        tasks,
        task_folder=data.tasks,
        batch_size=evaluate.batch_size,
        limit=evaluate.question_limit,
        lower_is_better=hazardous,
    )
    by_task = dict(zip(tasks, single, strict=True))
    pools = [pool(f"accuracy/{name}", [by_task[t] for t in names]) for name, names in world.pools.items()]
    return [*pools, *single]


def edit_cases(edits: Sequence[EditRecord]) -> list[EditCase]:
    """Return edits as the editing evaluator takes them."""
    return [
        EditCase(
            record.edit.subject,
            record.edit.prompt,
            record.edit.target,
            record.paraphrases,
            tuple(Probe(probe.prompt, probe.answer) for probe in record.locality),
        )
        for record in edits
    ]


def recall_facts(facts: Sequence[FactRecord]) -> list[Fact]:
    """Return facts as the recall evaluator takes them."""
    return [Fact(fact.prompt, fact.answer, fact.relation, fact.split) for fact in facts]
