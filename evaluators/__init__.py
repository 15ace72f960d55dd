"""Evaluators: each measures one aspect of a causal language model and returns measurements.

    from evaluators import EditCase, Probe, measure_editing
    measurements = measure_editing(model, tokenizer, cases)

Independent of pytest and, except for small helpers such as `interventions.tokens`, of the interventions.
Importing it imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evaluators.measurement import EvaluationError, Measurement

if TYPE_CHECKING:
    from evaluators.answers import Likelihood, score_answers
    from evaluators.data import Chat, EditCase, EvaluationData, Fact, Probe, Question, UneditedAnswers
    from evaluators.editing import capture_unedited, measure_editing
    from evaluators.efficiency import measure_efficiency
    from evaluators.generation import greedy
    from evaluators.latency import forward_pass, measure_latency
    from evaluators.likelihood import LogLikelihood, log_likelihood
    from evaluators.muse import measure_knowledge, measure_verbatim, membership_auc, min_k_scores, privacy_leak
    from evaluators.perplexity import measure_answer_perplexity, measure_perplexity
    from evaluators.questions import measure_questions, pool
    from evaluators.recall import measure_recall, score_facts
    from evaluators.recovery import returned
    from evaluators.refusal import is_refusal, measure_refusal, measure_refusal_score
    from evaluators.registry import Evaluator, Metric
    from evaluators.survival import measure_sequence, measure_survival
    from evaluators.tofu import forget_quality, measure_qa, model_utility
    from evaluators.tuning import measure_tuning, preference_margins, preference_wins

_MODULES = {
    "answers": "Likelihood score_answers",
    "data": "Chat EditCase EvaluationData Fact Probe Question UneditedAnswers",
    "editing": "capture_unedited measure_editing",
    "efficiency": "measure_efficiency",
    "generation": "greedy",
    "latency": "forward_pass measure_latency",
    "likelihood": "LogLikelihood log_likelihood",
    "muse": "measure_knowledge measure_verbatim membership_auc min_k_scores privacy_leak",
    "perplexity": "measure_answer_perplexity measure_perplexity",
    "questions": "measure_questions pool",
    "recall": "measure_recall score_facts",
    "recovery": "returned",
    "refusal": "is_refusal measure_refusal measure_refusal_score",
    "registry": "Evaluator Metric",
    "survival": "measure_sequence measure_survival",
    "tofu": "forget_quality measure_qa model_utility",
    "tuning": "measure_tuning preference_margins preference_wins",
}
"""Public names by module."""

__all__ = [
    "Chat",
    "EditCase",
    "EvaluationData",
    "EvaluationError",
    "Evaluator",
    "Fact",
    "Likelihood",
    "LogLikelihood",
    "Measurement",
    "Metric",
    "Probe",
    "Question",
    "UneditedAnswers",
    "capture_unedited",
    "forget_quality",
    "forward_pass",
    "greedy",
    "is_refusal",
    "log_likelihood",
    "measure_answer_perplexity",
    "measure_editing",
    "measure_efficiency",
    "measure_knowledge",
    "measure_latency",
    "measure_perplexity",
    "measure_qa",
    "measure_questions",
    "measure_recall",
    "measure_refusal",
    "measure_refusal_score",
    "measure_sequence",
    "measure_survival",
    "measure_tuning",
    "measure_verbatim",
    "membership_auc",
    "min_k_scores",
    "model_utility",
    "pool",
    "preference_margins",
    "preference_wins",
    "privacy_leak",
    "returned",
    "score_answers",
    "score_facts",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"evaluators.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
