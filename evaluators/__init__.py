"""Evaluators: each measures one aspect of a causal language model and returns measurements.

    from evaluators import EditCase, Probe, measure_editing
    measurements = measure_editing(model, tokenizer, cases)

Knows neither pytest nor the interventions. Importing it imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evaluators.measurement import EvaluationError, Measurement

if TYPE_CHECKING:
    from evaluators.answers import Probe
    from evaluators.editing import EditCase, UneditedAnswers, capture_unedited, measure_editing
    from evaluators.generation import greedy
    from evaluators.likelihood import LogLikelihood, log_likelihood
    from evaluators.perplexity import measure_perplexity
    from evaluators.questions import measure_questions, pool
    from evaluators.recall import Fact, measure_recall

_MODULES = {
    "Probe": "evaluators.answers",
    "EditCase": "evaluators.editing",
    "UneditedAnswers": "evaluators.editing",
    "capture_unedited": "evaluators.editing",
    "measure_editing": "evaluators.editing",
    "greedy": "evaluators.generation",
    "LogLikelihood": "evaluators.likelihood",
    "log_likelihood": "evaluators.likelihood",
    "measure_perplexity": "evaluators.perplexity",
    "measure_questions": "evaluators.questions",
    "pool": "evaluators.questions",
    "Fact": "evaluators.recall",
    "measure_recall": "evaluators.recall",
}

__all__ = [
    "EditCase",
    "EvaluationError",
    "Fact",
    "LogLikelihood",
    "Measurement",
    "Probe",
    "UneditedAnswers",
    "capture_unedited",
    "greedy",
    "log_likelihood",
    "measure_editing",
    "measure_perplexity",
    "measure_questions",
    "measure_recall",
    "pool",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
