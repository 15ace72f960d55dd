"""Metrics of MUSE (Shi et al., 2024, arXiv:2407.06460): verbatim and knowledge memorisation, and privacy leakage."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from evaluators.continuations import Scored, score
from evaluators.data import Probe, Question
from evaluators.encoding import Pair, encode, padding_id
from evaluators.measurement import EvaluationError, Measurement, shorten
from evaluators.memorisation import continuations, encode_answers, measure_extraction, record_names, text_of
from evaluators.rouge import rouge_l
from evaluators.state import borrowed
from interventions.tokens import frame

_STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where the answer to a question ends: the model goes on with a question of its own."""
_TOKENS_PER_ROW = 256
"""Long texts are read in smaller batches: a pass has at most this many tokens for each row of a batch."""


def measure_verbatim(
    model: Any, tokenizer: Any, probes: Sequence[Probe], *, tokens: int = 128, batch_size: int = 32
) -> list[Measurement]:
    """Measure `verbmem` (MUSE, section 3.1) and `extraction_strength/verbatim` of texts to forget; lower is better.

    `verbmem` is the ROUGE-L F1 of a text's first `tokens` tokens after its beginning, and as many greedy ones. The
    extraction strength is that of the same tokens.
    """
    texts = [(probe.prompt, probe.answer) for probe in probes]
    pairs = encode_answers(model, tokenizer, texts, record_names("verbatim", len(texts)), tokens, cut=True)
    with borrowed(model, tokenizer):
        scored = score(model, pairs, fill=padding_id(tokenizer), rows=batch_size)
    said = continuations(model, tokenizer, [pair.prompt for pair in pairs], tokens, batch_size)
    wanted = [text_of(tokenizer, pair.target) for pair in pairs]
    note = f"ROUGE-L F1 of greedy continuations, {tokens} tokens"
    return [
        _rouge_f1("verbmem", wanted, said, False, note),
        measure_extraction("extraction_strength/verbatim", scored, [pair.target for pair in pairs]),
    ]


def measure_knowledge(
    model: Any, tokenizer: Any, name: str, questions: Sequence[Question], *, tokens: int = 32, batch_size: int = 32
) -> Measurement:
    """Measure `knowmem` of the set `forget` or `retain` (MUSE, section 3.1): ROUGE-L F1 of greedy answers.

    An answer ends at a blank line or where the model writes another question.
    """
    texts = [(question.prompt, question.answer) for question in questions]
    pairs = encode_answers(model, tokenizer, texts, record_names(f"knowledge.{name}", len(texts)), tokens)
    said = continuations(model, tokenizer, [pair.prompt for pair in pairs], tokens, batch_size, _STOPS)
    note = f"ROUGE-L F1 of greedy answers, up to {tokens} tokens"
    return _rouge_f1(f"knowmem/{name}", [question.answer for question in questions], said, name != "forget", note)


def _rouge_f1(
    metric: str, wanted: Sequence[str], said: Sequence[str | None], higher_is_better: bool, note: str
) -> Measurement:
    values = [
        math.nan if text is None else rouge_l(reference, text, stem=False).f1
        for reference, text in zip(wanted, said, strict=True)
    ]
    answers = [shorten(text or "") for text in said]
    return Measurement.mean(metric, values, higher_is_better=higher_is_better, note=note, answers=answers)


def min_k_scores(
    model: Any, tokenizer: Any, texts: Sequence[str], *, k: float = 0.4, tokens: int = 2048, batch_size: int = 32
) -> list[float]:
    """Return the Min-K% probability of each text (Shi et al., ICLR 2024): higher if the model was trained on it.

    It is the mean log-probability of the share `k` of its first `tokens` tokens that are least likely. NaN for broken
    logits. Raises EvaluationError for a text with nothing to score.
    """
    start = len(frame(tokenizer).start)
    context = max(1, start)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = tokens + start if limit is None or limit <= 0 else min(tokens + start, limit)
    rows = [ids[:most] for ids in encode(tokenizer, texts)]
    for number, row in enumerate(rows, start=1):
        if len(row) <= context:
            raise EvaluationError(f"world.membership: text {number} of a set has no tokens to score")
    size = max(1, batch_size * _TOKENS_PER_ROW // max(map(len, rows)))
    pairs = [Pair(row[:context], row[context:]) for row in rows]
    with borrowed(model, tokenizer):
        found = score(model, pairs, fill=padding_id(tokenizer), rows=min(batch_size, size))
    return [_lowest(scored, k) for scored in found]


def _lowest(scored: Scored, k: float) -> float:
    if math.isnan(scored.total):
        return math.nan
    least = sorted(scored.logs)[: max(1, int(scored.tokens * k))]
    return math.fsum(least) / len(least)


def membership_auc(forget: Sequence[float], holdout: Sequence[float]) -> Measurement:
    """Measure how well scores tell texts to forget from texts never seen: the area under the ROC curve.

    1 means that every text to forget has the higher score, 0.5 that the scores tell nothing. A sample is the share of
    held-out texts with a lower score than one text to forget; the standard error also covers the sample of held-out
    texts (DeLong et al., 1988).
    """
    n = len(forget)
    if any(map(math.isnan, (*forget, *holdout))):
        return Measurement("membership_auc", math.nan, None, n, False, (), "NaN or infinite logits")
    placed = _placements(forget, holdout)
    others = _placements(holdout, forget)
    value = math.fsum(placed) / n
    error = None
    if n > 1 and len(holdout) > 1:
        error = math.sqrt(_variance(placed) / n + _variance(others) / len(holdout))
    note = f"{n} texts to forget against {len(holdout)} texts never seen; 0.5 is best"
    return Measurement("membership_auc", value, error, n, False, tuple(placed), note)


def _placements(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return for each score the share of `others` below it, equal ones counting half."""
    ordered = sorted(others)
    return [(bisect_left(ordered, x) + bisect_right(ordered, x)) / (2 * len(ordered)) for x in scores]


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def privacy_leak(auc: Measurement, retained: float) -> list[Measurement]:
    """Measure PrivLeak in percent (MUSE, section 3.1), and its distance from 0.

    MUSE ranks texts by their loss, so its AUC is 1 - `membership_auc`: PrivLeak is the relative difference between
    that of the model and that of a model trained without the data to forget, whose `membership_auc` is `retained`. 0
    is best; below 0, the model still shows that it was trained on the data, above 0 that it was made to forget them.
    Its standard error takes `retained` as given.

    `retained` must be below 1.
    """
    scale = 100 / (1 - retained)
    value = scale * (retained - auc.value)
    error = None if auc.stderr is None else scale * auc.stderr
    samples = tuple(scale * (retained - sample) for sample in auc.samples)
    note = f"percent; membership_auc {auc.value:.4g}, of the retain model {retained:.4g}; 0 is best"
    sign = -1.0 if value < 0 else 1.0
    return [
        Measurement("privleak", value, error, auc.n, True, samples, note),
        Measurement("privleak_distance", abs(value), error, auc.n, False, tuple(sign * x for x in samples), note),
    ]
