"""Evaluators: each measures one aspect of a causal language model and returns measurements.

    from evaluators import EditCase, Probe, measure_editing
    measurements = measure_editing(model, tokenizer, cases)

Knows neither pytest nor the interventions, except for `interventions.tokens`: how text becomes tokens is the
same for both. Importing it imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evaluators.measurement import EvaluationError, Measurement

if TYPE_CHECKING:
    from evaluators.answers import Likelihood, score_answers
    from evaluators.asked import Asked, EditCase, Fact, Probe, UneditedAnswers
    from evaluators.editing import capture_unedited, measure_editing
    from evaluators.efficiency import measure_efficiency
    from evaluators.generation import greedy
    from evaluators.latency import forward_pass, measure_latency
    from evaluators.likelihood import LogLikelihood, log_likelihood
    from evaluators.perplexity import measure_answer_perplexity, measure_perplexity
    from evaluators.questions import measure_questions, pool
    from evaluators.recall import measure_recall, score_facts
    from evaluators.recovery import returned
    from evaluators.registry import Evaluator, Metric
    from evaluators.survival import measure_survival

_MODULES = {
    "Asked": "evaluators.asked",
    "Evaluator": "evaluators.registry",
    "Metric": "evaluators.registry",
    "Likelihood": "evaluators.answers",
    "score_answers": "evaluators.answers",
    "measure_answer_perplexity": "evaluators.perplexity",
    "score_facts": "evaluators.recall",
    "Probe": "evaluators.asked",
    "EditCase": "evaluators.asked",
    "UneditedAnswers": "evaluators.asked",
    "capture_unedited": "evaluators.editing",
    "measure_editing": "evaluators.editing",
    "measure_efficiency": "evaluators.efficiency",
    "greedy": "evaluators.generation",
    "forward_pass": "evaluators.latency",
    "measure_latency": "evaluators.latency",
    "LogLikelihood": "evaluators.likelihood",
    "log_likelihood": "evaluators.likelihood",
    "measure_perplexity": "evaluators.perplexity",
    "measure_questions": "evaluators.questions",
    "pool": "evaluators.questions",
    "Fact": "evaluators.asked",
    "measure_recall": "evaluators.recall",
    "returned": "evaluators.recovery",
    "measure_survival": "evaluators.survival",
}

__all__ = [
    "Asked",
    "EditCase",
    "EvaluationError",
    "Evaluator",
    "Fact",
    "Likelihood",
    "LogLikelihood",
    "Measurement",
    "Metric",
    "Probe",
    "UneditedAnswers",
    "capture_unedited",
    "forward_pass",
    "greedy",
    "log_likelihood",
    "measure_answer_perplexity",
    "measure_editing",
    "measure_efficiency",
    "measure_latency",
    "measure_perplexity",
    "measure_questions",
    "measure_recall",
    "measure_survival",
    "pool",
    "returned",
    "score_answers",
    "score_facts",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
