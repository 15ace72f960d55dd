"""Recall of facts: whether the model says each fact's answer, word for word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.answers import Probe, answer_probes
from evaluators.measurement import EvaluationError, Measurement


@dataclass(frozen=True)
class Fact:
    """A prompt, its true answer without a leading space, and where the fact belongs."""

    prompt: str
    answer: str
    relation: str
    split: str = ""


def measure_recall(model: Any, tokenizer: Any, facts: Sequence[Fact], *, batch_size: int = 32) -> list[Measurement]:
    """Measure the share of facts whose greedy answer is exactly right, token by token.

    Returns `recall` over all facts, then `recall/<relation>` by name of relation. Splits are for
    the caller to choose from: pass the facts of one split to measure it alone.
    Raises EvaluationError for no facts or an answer without tokens.
    """
    if not facts:
        raise EvaluationError("recall: no facts; is the fact file empty?")
    answers = answer_probes(
        model,
        tokenizer,
        [Probe(fact.prompt, fact.answer) for fact in facts],
        [f"fact {i}" for i in range(len(facts))],
        batch_size,
    )
    outcomes = [answer.scores.exact for answer in answers]
    note = "greedy, exact token sequence"
    measurements = [Measurement.mean("recall", outcomes, note=note)]
    for relation in sorted({fact.relation for fact in facts}):
        chosen = [x for x, fact in zip(outcomes, facts, strict=True) if fact.relation == relation]
        measurements.append(Measurement.mean(f"recall/{relation}", chosen, note=note))
    return measurements
