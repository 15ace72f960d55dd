"""Generate short answers and compare them with the expected ones, token by token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from evaluators.continuations import Scored, score
from evaluators.data import Probe
from evaluators.encoding import Pair, check_length, encode_pairs, meaningless_ids, padding_id
from evaluators.generation import continue_greedily, stop_ids
from evaluators.measurement import EvaluationError
from evaluators.state import borrowed
from interventions.tokens import Chat


class Scores(NamedTuple):
    """Agreement of an answer with its target, each from 0 to 1."""

    f1: float
    recall: float
    exact: float


_BROKEN = Scores(math.nan, math.nan, math.nan)


class Likelihood(NamedTuple):
    """A given answer and its likelihood after its prompt."""

    ids: list[int]
    scored: Scored

    @property
    def probability(self) -> float:
        """The geometric mean of the tokens' probabilities: exp(log-likelihood / tokens)."""
        return math.exp(self.scored.total / self.scored.tokens)


class Answer(NamedTuple):
    """A generated answer and its scores, which are NaN if the logits are NaN or infinite."""

    generated: tuple[int, ...] | None
    """None if the logits are NaN or infinite."""
    scores: Scores
    margin: float | None
    """Probability per token of the answer minus that of its rival; None without a rival."""


def score_tokens(generated: Sequence[int], target: Sequence[int], ignored: AbstractSet[int] = frozenset()) -> Scores:
    """Compare generated ids with the target ids: F1 and recall as sets, exact as sequences.

    `ignored` ids are removed from both; then the generated ids are cut to the length of the target.
    Raises EvaluationError if the target is empty without the ignored ids.
    """
    wanted = [i for i in target if i not in ignored]
    if not wanted:
        raise EvaluationError("the target has no tokens to compare with")
    answer = [i for i in generated if i not in ignored][: len(wanted)]
    overlap = len(set(answer) & set(wanted))
    if overlap == 0:
        return Scores(0.0, 0.0, 0.0)
    recall = overlap / len(set(wanted))
    precision = overlap / len(set(answer))
    return Scores(2 * precision * recall / (precision + recall), recall, float(answer == wanted))


def score_answers(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    records: Sequence[str],
    batch_size: int = 32,
    *,
    chat: Chat | None = None,
) -> list[Likelihood]:
    """Score the answer of every probe after its prompt, in the chat template with `chat`; rivals are ignored.

    `records` are the names of the probes in errors. Logits that are NaN or infinite give NaN.
    Raises EvaluationError for an answer of special tokens and spaces only, and for a text that is too long.
    """
    texts = [(probe.prompt, probe.answer) for probe in probes]
    pairs = _encode(model, tokenizer, texts, records, chat)
    with borrowed(model, tokenizer):
        found = score(model, pairs, fill=padding_id(tokenizer), rows=batch_size)
    return [Likelihood(pair.target, scored) for pair, scored in zip(pairs, found, strict=True)]


def answer_probes(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    records: Sequence[str],
    batch_size: int = 32,
    *,
    chat: Chat | None = None,
) -> list[Answer]:
    """Generate an answer to every probe greedily, with as many tokens as the expected answer.

    Answers and rivals are scored first. If the greedy tokens follow one of these texts, its scoring
    pass already contains the generated ids; the model generates only for the other prompts.
    Raises EvaluationError like `score_answers`, also for rivals.
    """
    ignored = meaningless_ids(tokenizer)
    texts = [(probe.prompt, probe.answer) for probe in probes]
    with_rival = [i for i, probe in enumerate(probes) if probe.rival]
    pairs = _encode(
        model,
        tokenizer,
        [*texts, *((probes[i].prompt, probes[i].rival) for i in with_rival)],
        [*records, *(f"{records[i]}, the rival answer" for i in with_rival)],
        chat,
    )
    with borrowed(model, tokenizer):
        found = score(model, pairs, fill=padding_id(tokenizer), rows=batch_size)
    likelihoods = [Likelihood(pair.target, scored) for pair, scored in zip(pairs, found, strict=True)]
    generated = _generate(model, tokenizer, pairs[: len(probes)], pairs, found, batch_size)
    rivals = dict(zip(with_rival, likelihoods[len(probes) :], strict=True))
    return [
        Answer(
            None if ids is None else tuple(ids),
            _BROKEN if ids is None else score_tokens(ids, own.ids, ignored),
            own.probability - rivals[i].probability if i in rivals else None,
        )
        for i, (ids, own) in enumerate(zip(generated, likelihoods[: len(probes)], strict=True))
    ]


def _encode(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], records: Sequence[str], chat: Chat | None
) -> list[Pair]:
    """Encode prompts and answers; raises EvaluationError for an answer without tokens or a text that is too long."""
    ignored = meaningless_ids(tokenizer)
    pairs = encode_pairs(tokenizer, texts, chat)
    for record, (prompt, answer), pair in zip(records, texts, pairs, strict=True):
        if ignored.issuperset(pair.target):
            raise EvaluationError(f"{record}: the answer {answer!r} to {prompt!r} has no tokens")
        check_length(model, len(pair.prompt) + len(pair.target), f"{record}: {prompt!r}")
    return pairs


def _generate(
    model: Any,
    tokenizer: Any,
    wanted: Sequence[Pair],
    pairs: Sequence[Pair],
    found: Sequence[Scored],
    batch_size: int,
) -> list[list[int] | None]:
    """Return the greedy continuation of each prompt in `wanted`, at most as long as its target; None if broken."""
    stops = stop_ids(model, tokenizer)
    paths: defaultdict[tuple[int, ...], list[tuple[list[int], tuple[int, ...]]]] = defaultdict(list)
    for pair, scored in zip(pairs, found, strict=True):
        if math.isnan(scored.total):  # argmax of NaN is meaningless
            continue
        paths[tuple(pair.prompt)].append((pair.target, scored.greedy_ids))
    known = [_read_off(paths[tuple(pair.prompt)], len(pair.target), stops) for pair in wanted]
    missing = [i for i, ids in enumerate(known) if ids is None]
    budgets = [len(wanted[i].target) for i in missing]
    generated = continue_greedily(model, tokenizer, [wanted[i].prompt for i in missing], budgets, batch_size)
    rest = dict(zip(missing, generated, strict=True))
    return [rest[i] if ids is None else ids for i, ids in enumerate(known)]


def _read_off(
    paths: Sequence[tuple[list[int], tuple[int, ...]]], budget: int, stops: Sequence[int]
) -> list[int] | None:
    """Return the greedy continuation of a prompt from texts that were scored after it, or None if they do not suffice.

    `paths` are these texts with the greedy id at each position. A greedy id is the next generated one
    if the text before it equals what was generated so far.
    """
    found: list[int] = []
    while (n := len(found)) < budget:
        token = next((greedy[n] for ids, greedy in paths if ids[:n] == found and len(ids) > n), None)
        if token is None or token in stops:
            return None if token is None else found
        found.append(token)
    return found
