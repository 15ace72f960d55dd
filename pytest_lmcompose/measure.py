"""Run the evaluators of a recipe on a model state. Imports torch with the first measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluators import (
    EditCase,
    EvaluationError,
    Fact,
    Measurement,
    Probe,
    measure_answer_perplexity,
    measure_editing,
    measure_efficiency,
    measure_latency,
    measure_perplexity,
    measure_recall,
    score_facts,
)
from evaluators import capture_unedited as _capture
from evaluators.registry import Asked, find_evaluator
from pytest_lmcompose.data.records import EditRecord, FactRecord
from pytest_lmcompose.data.run_data import RunData
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

if TYPE_CHECKING:
    from evaluators import UneditedAnswers

NEIGHBOURS = "recall_same_subject"
FORGETTABLE = "recall_to_forget"


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
    found += _facts(model, tokenizer, data, evaluate)
    if evaluate.perplexity and data.edits:
        found += _edit_perplexity(model, tokenizer, data.edits, size)
    if evaluate.perplexity and data.perplexity:
        found.append(measure_perplexity(model, tokenizer, data.perplexity, window=evaluate.window, batch_size=size))
    if evaluate.questions and (world.pools or evaluate.tasks):
        found += _questions(model, tokenizer, data, world, evaluate)
    if evaluate.efficiency:
        found += measure_efficiency(model, length=evaluate.latency_length)
    if evaluate.latency:
        found += measure_latency(
            model, batch=evaluate.latency_batch, length=evaluate.latency_length, repeats=evaluate.latency_repeats
        )
    return found + _also(model, tokenizer, data, evaluate, {m.metric for m in found})


def _also(model: Any, tokenizer: Any, data: RunData, evaluate: EvaluateSettings, taken: set[str]) -> list[Measurement]:
    """Run the evaluators of other packages; each metric must be a new one."""
    asked = Asked(tuple(edit_cases(data.edits)), tuple(recall_facts(data.facts)), data.perplexity, evaluate.batch_size)
    found: list[Measurement] = []
    for name, values in evaluate.also.items():
        evaluator = find_evaluator(name)
        for measurement in evaluator.load()(model, tokenizer, evaluator.settings_type()(**values), asked):
            if measurement.metric in taken:
                raise EvaluationError(f"the evaluator {name} measures {measurement.metric}, which is there already")
            taken.add(measurement.metric)
            found.append(measurement)
    return found


def _facts(model: Any, tokenizer: Any, data: RunData, evaluate: EvaluateSettings) -> list[Measurement]:
    """Measure recall and perplexity of the facts, both from one pass over them, and recall of the other facts."""
    size = evaluate.batch_size
    found: list[Measurement] = []
    facts = recall_facts(data.facts)
    if facts and (evaluate.recall or evaluate.perplexity):
        scored = score_facts(model, tokenizer, facts, batch_size=size)
        if evaluate.recall:
            found += measure_recall(model, tokenizer, facts, scored=scored)
        if evaluate.perplexity:
            probes = [Probe(fact.prompt, fact.answer) for fact in facts]
            found.append(measure_answer_perplexity(model, tokenizer, probes, metric="perplexity_qa", scored=scored))
    for metric, others in ((NEIGHBOURS, data.neighbours), (FORGETTABLE, data.forgettable)):
        if evaluate.recall and others:
            pooled = measure_recall(model, tokenizer, recall_facts(others), batch_size=size)[0]
            better = metric != FORGETTABLE
            found.append(dataclasses.replace(pooled, metric=metric, higher_is_better=better))
    return found


def _edit_perplexity(model: Any, tokenizer: Any, edits: Sequence[EditRecord], size: int) -> list[Measurement]:
    """Measure how likely the new targets are after their prompts, and prompts and targets together."""
    probes = [Probe(record.edit.prompt, record.edit.target) for record in edits]
    return [
        measure_answer_perplexity(model, tokenizer, probes, metric=metric, with_prompt=with_prompt, batch_size=size)
        for metric, with_prompt in (("perplexity_edits", False), ("perplexity_edits_prompt", True))
    ]


def _questions(
    model: Any, tokenizer: Any, data: RunData, world: WorldSettings, evaluate: EvaluateSettings
) -> list[Measurement]:
    """Measure the tasks of all pools and the further ones at once, then pool them."""
    from evaluators import measure_questions, pool  # lm-evaluation-harness takes seconds to import

    names = [name for names in world.pools.values() for name in names]
    hazardous = {name for pool in world.hazardous for name in world.pools[pool]}
    single = measure_questions(
        model,
        tokenizer,
        list(dict.fromkeys([*names, *evaluate.tasks])),
        task_folder=data.tasks,
        batch_size=evaluate.batch_size,
        limit=evaluate.question_limit,
        num_fewshot=evaluate.num_fewshot,
        lower_is_better=hazardous,
        options=evaluate.options,
        trust_code=world.trust_code,
    )
    by_name = {m.metric.partition("/")[2]: m for m in reversed(single)}
    pools = [pool(f"accuracy/{name}", [by_name[t] for t in names]) for name, names in world.pools.items() if names]
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
            tuple(Probe(probe.prompt, probe.answer, probe.before) for probe in record.portability),
            record.truth,
        )
        for record in edits
    ]


def recall_facts(facts: Sequence[FactRecord]) -> list[Fact]:
    """Return facts as the recall evaluator takes them."""
    return [Fact(fact.prompt, fact.answer, fact.relation, fact.split) for fact in facts]
