"""Recall of facts: whether the model says each fact's answer, word for word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluators.answers import Likelihood, score_answers
from evaluators.asked import Asked, Fact, Probe
from evaluators.measurement import EvaluationError, Measurement, shown
from evaluators.settings import NoSettings


def evaluate(model: Any, tokenizer: Any, settings: NoSettings, asked: Asked) -> list[Measurement]:
    """Measure recall of the facts, in all and by relation, and of the neighbours and the facts to forget."""
    found: list[Measurement] = []
    if asked.facts:
        found += measure_recall(model, tokenizer, asked.facts, scored=scored_facts(model, tokenizer, asked))
    for metric, facts, better in (
        ("recall_same_subject", asked.neighbours, True),
        ("recall_to_forget", asked.forgettable, False),
    ):
        if facts:
            pooled = measure_recall(model, tokenizer, facts, batch_size=asked.batch_size)[0]
            found.append(replace(pooled, metric=metric, higher_is_better=better))
    return found


def scored_facts(model: Any, tokenizer: Any, asked: Asked) -> list[Likelihood]:
    """Return the scores of the answers to all facts, from one pass per state."""
    return asked.once("facts", lambda: score_facts(model, tokenizer, asked.facts, batch_size=asked.batch_size))


def score_facts(model: Any, tokenizer: Any, facts: Sequence[Fact], *, batch_size: int = 32) -> list[Likelihood]:
    """Score the answer of every fact: what `measure_recall` and `measure_answer_perplexity` read."""
    probes = [Probe(fact.prompt, fact.answer) for fact in facts]
    return score_answers(model, tokenizer, probes, [f"fact {i}" for i in range(len(facts))], batch_size)


def measure_recall(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    batch_size: int = 32,
    scored: Sequence[Likelihood] | None = None,
) -> list[Measurement]:
    """Measure the share of facts whose greedy answer is exactly right, token by token.

    Greedy decoding gives the answer exactly if each of its tokens is the likeliest after those
    before it, so one pass over prompt and answer tells, and nothing is generated. `scored` are the
    facts as `score_facts` has scored them already.

    Returns `recall` over all facts, then `recall/<relation>` by name of relation. Splits are for
    the caller to choose from: pass the facts of one split to measure it alone.
    Samples are NaN where the logits are. Raises EvaluationError for no facts and an answer without tokens.
    """
    if not facts:
        raise EvaluationError("recall: no facts; is the fact file empty?")
    found = score_facts(model, tokenizer, facts, batch_size=batch_size) if scored is None else scored
    outcomes = [
        math.nan if math.isnan(likelihood.scored.total) else float(list(likelihood.scored.said) == likelihood.ids)
        for likelihood in found
    ]
    note = "greedy, exact token sequence"
    measurements = [Measurement.mean("recall", outcomes, note=note, answers=[_said(tokenizer, one) for one in found])]
    for relation in sorted({fact.relation for fact in facts}):
        chosen = [x for x, fact in zip(outcomes, facts, strict=True) if fact.relation == relation]
        measurements.append(Measurement.mean(f"recall/{relation}", chosen, note=note))
    return measurements


def _said(tokenizer: Any, likelihood: Likelihood) -> str:
    """Return the model's own answer as far as the pass over the right one tells it: to the first token that differs."""
    said = list(likelihood.scored.said)
    same = next((i for i, (x, y) in enumerate(zip(said, likelihood.ids, strict=False)) if x != y), len(said))
    text = str(tokenizer.decode(said[: same + 1], skip_special_tokens=True))
    return shown(text + "…" if same + 1 < len(said) else text)
