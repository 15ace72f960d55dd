"""Perplexity of a text in fixed windows, and of answers after their prompts; weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from evaluators.answers import Likelihood, score_answers
from evaluators.asked import Asked, Probe
from evaluators.continuations import score
from evaluators.encoding import Pair, check_length, encode_pairs, padding_id
from evaluators.measurement import EvaluationError, Measurement, exp, ratio_error, total
from evaluators.passes import read
from evaluators.reading import reading
from evaluators.recall import scored_facts
from evaluators.settings import PerplexitySettings
from evaluators.state import borrowed
from interventions.tokens import frame, running, windows


class Window(NamedTuple):
    """Negative log-likelihood in nats, summed over the `tokens` scored tokens of one window."""

    nll: float
    tokens: int


def evaluate(model: Any, tokenizer: Any, settings: PerplexitySettings, asked: Asked) -> list[Measurement]:
    """Measure perplexity of the facts' answers, of the edits' targets (also with their prompts), and of the texts."""
    found: list[Measurement] = []
    if asked.facts:
        scored, facts = scored_facts(model, tokenizer, asked), [Probe(f.prompt, f.answer) for f in asked.facts]
        found.append(measure_answer_perplexity(model, tokenizer, facts, metric="perplexity_qa", scored=scored))
    edits, size = [Probe(case.prompt, case.target) for case in asked.edits], asked.batch_size
    for metric, whole in (("perplexity_edits", False), ("perplexity_edits_prompt", True)) if edits else ():
        found.append(
            measure_answer_perplexity(model, tokenizer, edits, metric=metric, with_prompt=whole, batch_size=size)
        )
    if asked.texts:
        found.append(measure_perplexity(model, tokenizer, asked.texts, window=settings.window, batch_size=size))
    return found


def measure_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 128,
    batch_size: int = 16,
    metric: str = "perplexity",
    separator: str = "\n\n",
) -> Measurement:
    """Measure exp(mean negative log-likelihood per token) of `texts`; lower is better.

    The texts are joined by `separator` (blank lines; `tokenizer.eos_token` is another good choice),
    encoded once and cut into windows of `window` tokens, the last one shorter. Each window is read
    alone, as a text: after BOS where the tokenizer puts one before every text, and it is context and
    never scored. Elsewhere the window's first token is the context. Windows of equal length in tokens
    make perplexities comparable between the states of a model, and between models of one tokenizer.

    Samples are the mean NLL of each window; the standard error treats windows as the independent
    units (delta method). Broken logits make the value NaN, or infinite, and the note says so.
    Raises EvaluationError for a text without scored tokens and a window longer than the model reads.
    """
    start = frame(tokenizer).start
    if window < (1 if start else 2):
        raise EvaluationError(f"{metric}: a window of {window} tokens leaves nothing to score; take a longer one")
    check_length(model, window + len(start), f"{metric}: a window of {window} tokens")
    rows = windows(tokenizer, running(tokenizer, texts, separator=separator), window)
    context = max(1, len(start))
    rows = [row for row in rows if len(row) > context]
    if not rows:
        raise EvaluationError(f"{metric}: the text has no tokens to score; is the file empty?")

    with borrowed(model, tokenizer):
        scored = _score(model, rows, context, batch_size, padding_id(tokenizer))
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
    scored: Sequence[Likelihood] | None = None,
) -> Measurement:
    """Measure exp(mean negative log-likelihood per token) of answers after their prompts; lower is better.

    Only the answer's tokens count, each as much as any other, and no BOS stands between prompt and
    answer. With `with_prompt` the prompt's tokens count too, all but the first one (BOS, where the
    tokenizer has it). `scored` are the answers as `score_answers` has scored them already.

    Samples are the mean NLL of each text; the error is as in `measure_perplexity`.
    Raises EvaluationError for no probes and for answers without tokens.
    """
    if not probes:
        raise EvaluationError(f"{metric}: no answers to score; is the file empty?")
    records = [f"{metric}, record {i}" for i in range(len(probes))]
    if scored is None:
        scored = score_answers(model, tokenizer, probes, records, batch_size)
    if with_prompt:
        pairs = encode_pairs(tokenizer, [(probe.prompt, probe.answer) for probe in probes])
        # The answer after its prompt is known; the prompt is scored after its own first token.
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
    """Return exp(sum of NLL / sum of tokens) and its error by the delta method, over independent windows."""
    tokens = sum(w.tokens for w in windows)
    mean = total(w.nll for w in windows) / tokens
    value = exp(mean)
    error = ratio_error([w.nll - mean * w.tokens for w in windows], tokens)
    if not math.isfinite(value):
        broken = sum(not math.isfinite(w.nll) for w in windows)
        note += f"; NOT FINITE: {broken} of {len(windows)} {units} have a NaN or infinite likelihood"
        note += "" if broken else f", but {mean:.4g} nats by token are too many for a number"
    samples = tuple(w.nll / w.tokens for w in windows)
    weights = tuple(float(w.tokens) for w in windows)
    error = None if error is None or not math.isfinite(value * error) else value * error
    return Measurement(metric, value, error, len(windows), False, samples, note, weights)


def _score(model: Any, rows: Sequence[list[int]], context: int, batch_size: int, fill: int) -> list[Window]:
    """Score rows in order, each after its first `context` tokens.

    Only rows of one length share a batch, so that nothing is padded.
    """
    windows = []
    size = batch_size if reading(model, fill).together else 1
    for _, same in groupby(rows, key=len):
        group = list(same)
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            logits = read(model, batch, fill)  # (rows, length, vocabulary)
            targets = torch.tensor(batch, device=logits.device)[:, context:]
            predicted = logits[:, context - 1 : -1]
            losses = cross_entropy(predicted.float().flatten(0, 1), targets.flatten(), reduction="none")
            totals = losses.view(targets.shape).double().sum(dim=1)
            windows += [Window(nll, targets.shape[1]) for nll in totals.tolist()]
    return windows
