"""Run the evaluators of a recipe on a model state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, cast

from evaluators.data import EvaluationData, RetainReference
from evaluators.measurement import EvaluationError, Measurement
from evaluators.registry import BUILT_IN, Evaluator, find_evaluator
from evaluators.settings import UnlearningSettings
from pytest_lmcompose.data.run_data import RunData
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

if TYPE_CHECKING:
    from evaluators import UneditedAnswers
    from evaluators.predictions import Predictions
    from interventions.known_grids import KnownGrid
    from pytest_lmcompose.steps import StepRecord

T = TypeVar("T")


def capture_unedited(
    model: Any,
    tokenizer: Any,
    data: RunData,
    evaluate: EvaluateSettings,
    predictions: Predictions | None = None,
) -> UneditedAnswers | None:
    """Record the base model's answers to the locality prompts, its preferences and its predictions.

    None if nothing of this is measured. `predictions` are the model's on the same texts, if you have them.
    """
    edits, preferences = evaluate.editing and data.edits, evaluate.tuning and data.tuning.preferences
    texts = evaluate.closeness and data.perplexity
    if not edits and not preferences and not texts:
        return None
    from evaluators import UneditedAnswers
    from evaluators import capture_unedited as capture
    from evaluators.closeness import capture_predictions
    from evaluators.tuning import preference_margins

    options: dict[str, Any] = {"batch_size": evaluate.batch_size, "chat": evaluate.chat}
    answers = capture(model, tokenizer, edits, **options) if edits else UneditedAnswers({})
    margins = preference_margins(model, tokenizer, preferences, **options) if preferences else ()
    if texts and predictions is None:
        size = evaluate.batch_size
        predictions = capture_predictions(model, tokenizer, texts, window=evaluate.window, batch_size=size)
    return dataclasses.replace(answers, margins=margins, predictions=predictions)


def capture_retained(model: Any, tokenizer: Any, data: RunData, evaluate: EvaluateSettings) -> RetainReference:
    """Measure what the states are compared with, of a model that was trained without the data to forget."""
    from evaluators.unlearning import capture_retained as capture

    settings = chosen_settings(UnlearningSettings, evaluate)
    return capture(model, tokenizer, settings, data.unlearning, evaluate.batch_size, evaluate.chat)


def measure_state(
    model: Any,
    tokenizer: Any,
    data: RunData,
    world: WorldSettings,
    evaluate: EvaluateSettings,
    unedited: UneditedAnswers | None,
    progress: Callable[[str, int, int], None] | None = None,
    retained: RetainReference | None = None,
    grids: Mapping[str, KnownGrid] | None = None,
    steps: Sequence[StepRecord] = (),
    *,
    is_base: bool = False,
    first: Collection[str] = (),
    watch: Callable[[Sequence[Measurement]], None] | None = None,
    enough: Callable[[Sequence[Measurement]], bool] | None = None,
) -> list[Measurement]:
    """Run the evaluators that the recipe switches on and return their measurements.

    `grids` says how the checkpoint stored quantised weights, `steps` what made the state, and
    `is_base` whether it is the model that `unedited` is of. `progress` is called before
    each evaluator with its name, its number from 1 and the total. The evaluators of the metrics `first` run first, and
    `watch` is called after each but the last, with what was measured so far: an exception of it ends the measuring.
    With `evaluate.sequential`, `enough` says whether the questions asked so far decide the state.
    Raises EvaluationError for a metric that is measured twice.
    """
    evaluation_data = EvaluationData(
        edits=data.edits,
        facts=data.facts,
        texts=data.perplexity,
        batch_size=evaluate.batch_size,
        neighbours=data.neighbours,
        forgettable=data.forgettable,
        unedited=unedited,
        is_base=is_base,
        task_folder=data.tasks,
        pools=world.pools,
        hazardous=tuple(world.hazardous),
        trust_code=world.trust_code,
        chat=evaluate.chat,
        unlearning=data.unlearning,
        tuning=data.tuning,
        retained=retained,
        refusal=data.refusal,
        grids=grids or {},
        sequence=last_sequence(steps),
        enough=enough,
    )
    chosen = list(switched_on(evaluate))
    found: dict[str, Measurement] = {}
    places: dict[str, int] = {}

    def later(place: int) -> bool:
        return not any(fnmatchcase(name, metric.name) for name in first for metric in chosen[place][0].metrics)

    for number, place in enumerate(sorted(range(len(chosen)), key=later), start=1):
        evaluator, settings = chosen[place]
        if progress is not None:
            progress(evaluator.name, number, len(chosen))
        for measurement in evaluator.load()(model, tokenizer, settings, evaluation_data):
            places[measurement.metric] = place
            if found.setdefault(measurement.metric, measurement) is not measurement:
                raise EvaluationError(
                    f"the evaluator {evaluator.name} returns {measurement.metric}, which was already measured"
                )
        if watch is not None and number < len(chosen):
            watch(tuple(found.values()))
    return sorted(found.values(), key=lambda measurement: places[measurement.metric])


def last_sequence(steps: Sequence[StepRecord]) -> tuple[int, ...]:
    """Return how many edits the last editing step made at once, batch by batch, from its details."""
    found = [step.report.details["sequence"] for step in steps if "sequence" in step.report.details]
    return tuple(found[-1]) if found else ()


def switched_on(evaluate: EvaluateSettings) -> Iterator[tuple[Evaluator, Any]]:
    """Yield the evaluators of a recipe with their settings: built-in ones first, then third-party ones."""
    for evaluator in BUILT_IN:
        if getattr(evaluate, evaluator.name):
            yield evaluator, chosen_settings(evaluator.settings_type(), evaluate)
    for name, values in evaluate.also.items():
        evaluator = find_evaluator(name)
        yield evaluator, evaluator.settings_type()(**values)


def chosen_settings(kind: Callable[..., T], evaluate: EvaluateSettings) -> T:
    """Return the settings of a built-in evaluator, a dataclass, from the recipe's section."""
    return kind(**{field.name: getattr(evaluate, field.name) for field in dataclasses.fields(cast(Any, kind))})
