"""Perplexity of text in fixed windows and of answers after their prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from evaluators.answers import Likelihood, score_answers
from evaluators.continuations import score
from evaluators.data import EvaluationData, Probe
from evaluators.encoding import Pair, check_length, encode_pairs, padding_id
from evaluators.measurement import EvaluationError, Measurement, exp, ratio_error, total
from evaluators.passes import read
from evaluators.predictions import Comparison, Difference
from evaluators.reading import reading
from evaluators.recall import scored_facts
from evaluators.settings import PerplexitySettings
from evaluators.state import borrowed
from interventions.tokens import Chat, frame, running, windows


class Window(NamedTuple):
    """Negative log-likelihood in nats, summed over the scored tokens of a window."""

    nll: float
    tokens: int


Observer = Callable[[list[list[int]], torch.Tensor, int], None]
"""Called with a batch of rows of ids, their logits (rows, length, vocabulary) and the number of tokens not scored."""


def evaluate(model: Any, tokenizer: Any, settings: PerplexitySettings, data: EvaluationData) -> list[Measurement]:
    """Measure perplexity of the facts' answers, the edits' targets with and without prompts, and the texts."""
    found: list[Measurement] = []
    if data.facts:
        scored, facts = scored_facts(model, tokenizer, data), [Probe(f.prompt, f.answer) for f in data.facts]
        found.append(measure_answer_perplexity(model, tokenizer, facts, metric="perplexity_qa", scored=scored))
    edits, size, chat = [Probe(case.prompt, case.target) for case in data.edits], data.batch_size, data.chat
    for metric, whole in (("perplexity_edits", False), ("perplexity_edits_prompt", True)) if edits else ():
        found.append(
            measure_answer_perplexity(
                model, tokenizer, edits, metric=metric, with_prompt=whole, batch_size=size, chat=chat
            )
        )
    if data.texts:
        found.append(read_texts(model, tokenizer, settings, data)[0])
    return found


def read_texts(
    model: Any, tokenizer: Any, settings: PerplexitySettings, data: EvaluationData
) -> tuple[Measurement, list[Difference]]:
    """Return the perplexity of the texts, and how far the model is from the base model if its predictions are known.

    Both come from one pass, which is made once per state; for the base model, it was made when they were recorded.
    """

    def read() -> tuple[Measurement, list[Difference]]:
        base = None if data.unedited is None else data.unedited.predictions
        if base is not None and data.is_base and math.isfinite(base.perplexity.value):
            return base.perplexity, base.of_itself()
        compared = None if base is None else Comparison(model, base)
        window, size = settings.window, data.batch_size
        found = measure_perplexity(model, tokenizer, data.texts, window=window, batch_size=size, observe=compared)
        return found, [] if compared is None else compared.windows

    return data.once("texts", read)


def measure_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 128,
    batch_size: int = 16,
    metric: str = "perplexity",
    separator: str = "\n\n",
    observe: Observer | None = None,
) -> Measurement:
    """Measure exp(mean negative log-likelihood per token) of `texts`; lower is better.

    The texts are joined by `separator` (a blank line; `tokenizer.eos_token` also works well), encoded
    once and cut into windows of `window` tokens; the last one is shorter. Each window is read on its
    own, after BOS if the tokenizer adds it; BOS is not scored. Without BOS, the window's first token is
    not scored. Perplexities are comparable between models with the same tokenizer.

    Samples are the mean NLL of each window; the standard error treats windows as independent (delta
    method). Broken logits make the value NaN or infinite, with a note. `observe` sees the logits of each batch.
    Raises EvaluationError for a text without scored tokens and for a window that is too long.
    """
    start = frame(tokenizer).start
    if window < (1 if start else 2):
        raise EvaluationError(f"{metric}: a window of {window} tokens has nothing to score; use a longer one")
    check_length(model, window + len(start), f"{metric}: a window of {window} tokens")
    rows = windows(tokenizer, running(tokenizer, texts, separator=separator), window)
    context = max(1, len(start))
    rows = [row for row in rows if len(row) > context]
    if not rows:
        raise EvaluationError(f"{metric}: the text has no tokens to score; is the file empty?")

    with borrowed(model, tokenizer):
        scored = _score(model, rows, context, batch_size, padding_id(tokenizer), observe)
    note = f"{len(scored)} windows of {window} tokens, {sum(w.tokens for w in scored)} tokens scored, " + (
        "each window after BOS" if start else "the first token of each window is context"
    )
    return _summarise(metric, scored, note, "windows")


def measure_answer_perplexity(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    metric: str,
    with_prompt: bool = False,
    batch_size: int = 32,
    chat: Chat | None = None,
    scored: Sequence[Likelihood] | None = None,
) -> Measurement:
    """Measure exp(mean negative log-likelihood per token) of answers after their prompts; lower is better.

    Scores the answer's tokens, without BOS between prompt and answer. With `with_prompt`, the prompt's
    tokens are scored too, except the first one (BOS, if the tokenizer adds it). With `chat`, the prompts are
    put into the chat template, whose tokens count as the prompt's. `scored` are the results of
    `score_answers`, if you have them.

    Samples are the mean NLL of each text; the error is as in `measure_perplexity`.
    Raises EvaluationError for no probes and for answers without tokens.
    """
    if not probes:
        raise EvaluationError(f"{metric}: no answers to score; is the file empty?")
    records = [f"{metric}, record {i}" for i in range(len(probes))]
    if scored is None:
        scored = score_answers(model, tokenizer, probes, records, batch_size, chat=chat)
    if with_prompt:
        pairs = encode_pairs(tokenizer, [(probe.prompt, probe.answer) for probe in probes], chat)
        # The answers are scored; score each prompt after its first token.
        heads = [Pair(pair.prompt[:1], pair.prompt[1:]) for pair in pairs]
        longer = [i for i, head in enumerate(heads) if head.target]
        with borrowed(model, tokenizer):
            found = score(model, [heads[i] for i in longer], fill=padding_id(tokenizer), rows=batch_size)
        before = dict(zip(longer, found, strict=True))
    texts = [
        Window(
            -own.scored.total - (before[i].total if with_prompt and i in before else 0.0),
            own.scored.tokens + (before[i].tokens if with_prompt and i in before else 0),
        )
        for i, own in enumerate(scored)
    ]
    what = "prompt and answer" if with_prompt else "answer after its prompt"
    note = f"{len(texts)} texts, {sum(text.tokens for text in texts)} tokens scored: {what}"
    return _summarise(metric, texts, note, "texts")


def _summarise(metric: str, windows: Sequence[Window], note: str, units: str) -> Measurement:
    """Return exp(sum of NLL / sum of tokens) with its error (delta method, independent windows)."""
    tokens = sum(w.tokens for w in windows)
    mean = total(w.nll for w in windows) / tokens
    value = exp(mean)
    error = ratio_error([w.nll - mean * w.tokens for w in windows], tokens)
    if not math.isfinite(value):
        broken = sum(not math.isfinite(w.nll) for w in windows)
        note += f"; NOT FINITE: {broken} of {len(windows)} {units} have a NaN or infinite likelihood"
        note += "" if broken else f", but {mean:.4g} nats per token overflow"
    samples = tuple(w.nll / w.tokens for w in windows)
    weights = tuple(float(w.tokens) for w in windows)
    error = None if error is None or not math.isfinite(value * error) else value * error
    return Measurement(metric, value, error, len(windows), False, samples, note, weights)


def _score(
    model: Any, rows: Sequence[list[int]], context: int, batch_size: int, fill: int, observe: Observer | None
) -> list[Window]:
    """Score each row after its first `context` tokens, in batches of equal length without padding."""
    windows = []
    size = batch_size if reading(model, fill).together else 1
    for _, same in groupby(rows, key=len):
        group = list(same)
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            logits = read(model, batch, fill)  # (rows, length, vocabulary)
            if observe is not None:
                observe(batch, logits, context)
            targets = torch.tensor(batch, device=logits.device)[:, context:]
            predicted = logits[:, context - 1 : -1]
            losses = cross_entropy(predicted.float().flatten(0, 1), targets.flatten(), reduction="none")
            totals = losses.view(targets.shape).double().sum(dim=1)
            windows += [Window(nll, targets.shape[1]) for nll in totals.tolist()]
    return windows
