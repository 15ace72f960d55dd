"""Recall of facts: exact-match accuracy of greedy answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluators.answers import Likelihood, score_answers
from evaluators.data import EvaluationData, Fact, Probe
from evaluators.measurement import EvaluationError, Measurement, shorten
from evaluators.settings import NoSettings
from interventions.tokens import Chat


def evaluate(model: Any, tokenizer: Any, settings: NoSettings, data: EvaluationData) -> list[Measurement]:
    """Measure recall of the facts, overall and by relation, of the neighbours and of the facts to forget."""
    found: list[Measurement] = []
    if data.facts:
        found += measure_recall(model, tokenizer, data.facts, scored=scored_facts(model, tokenizer, data))
    for metric, facts, better in (
        ("recall_same_subject", data.neighbours, True),
        ("recall_to_forget", data.forgettable, False),
    ):
        if facts:
            pooled = measure_recall(model, tokenizer, facts, batch_size=data.batch_size, chat=data.chat)[0]
            found.append(replace(pooled, metric=metric, higher_is_better=better))
    return found


def scored_facts(model: Any, tokenizer: Any, data: EvaluationData) -> list[Likelihood]:
    """Return the likelihoods of all facts' answers, computed once per state."""
    size, chat = data.batch_size, data.chat
    return data.once("facts", lambda: score_facts(model, tokenizer, data.facts, batch_size=size, chat=chat))


def score_facts(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, batch_size: int = 32, chat: Chat | None = None
) -> list[Likelihood]:
    """Score the answer of every fact, for `measure_recall` and `measure_answer_perplexity`."""
    probes = [Probe(fact.prompt, fact.answer) for fact in facts]
    return score_answers(model, tokenizer, probes, [f"fact {i}" for i in range(len(facts))], batch_size, chat=chat)


def measure_recall(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    batch_size: int = 32,
    chat: Chat | None = None,
    scored: Sequence[Likelihood] | None = None,
) -> list[Measurement]:
    """Measure the share of facts with an exactly correct greedy answer.

    The greedy answer is correct if each token is the most likely one after the tokens before it, so
    one pass over prompt and answer suffices and nothing is generated. With `chat`, the prompts are put into
    the chat template. `scored` are the results of `score_facts`, if you have them.

    Returns `recall` over all facts, then `recall/<relation>`, sorted. Broken logits give NaN samples.
    Raises EvaluationError for no facts and for an answer without tokens.
    """
    if not facts:
        raise EvaluationError("recall: no facts; is the fact file empty?")
    found = score_facts(model, tokenizer, facts, batch_size=batch_size, chat=chat) if scored is None else scored
    outcomes = list(map(exact, found))
    note = "greedy, exact token sequence"
    measurements = [Measurement.mean("recall", outcomes, note=note, answers=[said(tokenizer, one) for one in found])]
    for relation in sorted({fact.relation for fact in facts}):
        chosen = [x for x, fact in zip(outcomes, facts, strict=True) if fact.relation == relation]
        measurements.append(Measurement.mean(f"recall/{relation}", chosen, note=note))
    return measurements


def exact(likelihood: Likelihood) -> float:
    """Return 1 if the greedy answer is the expected one, otherwise 0; NaN if the logits are broken."""
    if math.isnan(likelihood.scored.total):
        return math.nan
    return float(list(likelihood.scored.greedy_ids) == likelihood.ids)


def said(tokenizer: Any, likelihood: Likelihood) -> str:
    """Return the model's own answer up to the first wrong token; the scoring pass shows no more."""
    said = list(likelihood.scored.greedy_ids)
    same = next((i for i, (x, y) in enumerate(zip(said, likelihood.ids, strict=False)) if x != y), len(said))
    text = str(tokenizer.decode(said[: same + 1], skip_special_tokens=True))
    return shorten(text + "…" if same + 1 < len(said) else text)
