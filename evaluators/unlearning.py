"""What a model forgot and kept, by the metrics of TOFU and MUSE, on whatever data of theirs a run has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evaluators.data import EvaluationData, RetainReference, UnlearningData
from evaluators.measurement import Measurement
from evaluators.muse import measure_knowledge, measure_verbatim, membership_auc, min_k_scores, privacy_leak
from evaluators.settings import UnlearningSettings
from evaluators.tofu import (
    FORGET,
    UTILITY_SETS,
    forget_quality,
    log_truth_ratio,
    measure_qa,
    model_utility,
    score_questions,
)

_NO_MODEL = "world.retain_model is not set"


def evaluate(model: Any, tokenizer: Any, settings: UnlearningSettings, data: EvaluationData) -> list[Measurement]:
    """Measure every metric that the run has data for; one that is left out is in the note of another."""
    return [*_tofu(model, tokenizer, settings, data), *_muse(model, tokenizer, settings, data)]


def capture_retained(
    model: Any, tokenizer: Any, settings: UnlearningSettings, data: UnlearningData, batch_size: int = 32
) -> RetainReference:
    """Measure what `forget_quality` and `privleak` need of a model that was trained without the data to forget."""
    questions = data.qa.get(FORGET, ())
    logs: tuple[float, ...] = ()
    if questions and all(question.wrong for question in questions):
        scored = score_questions(model, tokenizer, FORGET, questions, batch_size=batch_size)
        logs = tuple(map(log_truth_ratio, scored))
    auc = _membership(model, tokenizer, settings, data, batch_size)
    return RetainReference(logs, None if auc is None else auc.value)


def _tofu(model: Any, tokenizer: Any, settings: UnlearningSettings, data: EvaluationData) -> list[Measurement]:
    tokens, size = settings.answer_tokens, data.batch_size
    found: dict[str, Measurement] = {}
    for name, questions in data.unlearning.qa.items():
        scored = score_questions(model, tokenizer, name, questions, tokens=tokens, batch_size=size)
        for measured in measure_qa(model, tokenizer, name, questions, tokens=tokens, batch_size=size, scored=scored):
            found[measured.metric] = measured
        ratio = found.get(f"truth_ratio/{name}")
        if name != FORGET or ratio is None:
            continue
        if data.retained is None:
            found[ratio.metric] = replace(ratio, note=f"{ratio.note}; no forget_quality: {_NO_MODEL}")
        else:
            quality = forget_quality(list(map(log_truth_ratio, scored)), data.retained.log_truth_ratios)
            found[quality.metric] = quality
    kinds = ("rouge", "answer_probability", "truth_ratio")
    wanted = {name: [f"{kind}/{name}" for kind in kinds] for name in UTILITY_SETS}
    missing = [metric for metrics in wanted.values() for metric in metrics if metric not in found]
    if not missing:
        utility = model_utility({name: [found[metric] for metric in metrics] for name, metrics in wanted.items()})
        return [*found.values(), utility]
    note = f"no model_utility: it also needs {', '.join(missing)}"
    return [replace(m, note=f"{m.note}; {note}") if m.metric == "rouge/retain" else m for m in found.values()]


def _muse(model: Any, tokenizer: Any, settings: UnlearningSettings, data: EvaluationData) -> list[Measurement]:
    own, size = data.unlearning, data.batch_size
    found: list[Measurement] = []
    if own.verbatim:
        found += measure_verbatim(model, tokenizer, own.verbatim, tokens=settings.verbatim_tokens, batch_size=size)
    for name, questions in own.knowledge.items():
        tokens = settings.knowledge_tokens
        found.append(measure_knowledge(model, tokenizer, name, questions, tokens=tokens, batch_size=size))
    auc = _membership(model, tokenizer, settings, own, size)
    if auc is None:
        return found
    retained = None if data.retained is None else data.retained.auc
    if retained is not None and retained < 1:
        return [*found, auc, *privacy_leak(auc, retained)]
    why = _NO_MODEL if retained is None else "the retain model tells all texts to forget from those never seen"
    return [*found, replace(auc, note=f"{auc.note}; no privleak: {why}")]


def _membership(
    model: Any, tokenizer: Any, settings: UnlearningSettings, data: UnlearningData, batch_size: int
) -> Measurement | None:
    if not data.membership:
        return None
    forget, holdout = (
        min_k_scores(
            model,
            tokenizer,
            data.membership[name],
            k=settings.min_k,
            tokens=settings.membership_tokens,
            batch_size=batch_size,
        )
        for name in ("forget", "holdout")
    )
    return membership_auc(forget, holdout)
