"""Ask a model for short answers and compare them, token by token, with what they should be."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from evaluators.asked import Probe
from evaluators.continuations import Scored, score
from evaluators.encoding import Pair, check_length, encode_pairs, meaningless_ids, padding_id
from evaluators.generation import continue_greedily, stop_ids
from evaluators.measurement import EvaluationError
from evaluators.state import borrowed


class Scores(NamedTuple):
    """How well an answer agrees with its target: each in 0 to 1."""

    f1: float
    recall: float
    exact: float


_BROKEN = Scores(math.nan, math.nan, math.nan)


class Likelihood(NamedTuple):
    """A text after its prompt, as the model takes it when it is given, not generated."""

    ids: list[int]
    scored: Scored

    @property
    def probability(self) -> float:
        """The geometric mean of the tokens' probabilities: exp(log-likelihood / tokens)."""
        return math.exp(self.scored.total / self.scored.tokens)


class Answer(NamedTuple):
    """What the model said: the generated ids as they came, and their scores.

    Scores and margin are NaN where the model's logits are, so that it said nothing.
    """

    generated: tuple[int, ...] | None
    """None where the logits are NaN or infinite."""
    scores: Scores
    margin: float | None
    """Probability of the answer minus that of its rival, both by token; None without a rival."""


def score_tokens(generated: Sequence[int], target: Sequence[int], ignored: AbstractSet[int] = frozenset()) -> Scores:
    """Compare generated ids with the target's: F1 and recall as sets, exact as sequences.

    `ignored` ids are dropped from both, then what was generated is cut to the number of target
    ids that remain. Sets forgive order and repetition; `exact` forgives neither.
    Raises EvaluationError if nothing of the target remains.
    """
    wanted = [i for i in target if i not in ignored]
    if not wanted:
        raise EvaluationError("the target has no tokens to compare with")
    said = [i for i in generated if i not in ignored][: len(wanted)]
    overlap = len(set(said) & set(wanted))
    if overlap == 0:
        return Scores(0.0, 0.0, 0.0)
    recall = overlap / len(set(wanted))
    precision = overlap / len(set(said))
    return Scores(2 * precision * recall / (precision + recall), recall, float(said == wanted))


def score_answers(
    model: Any, tokenizer: Any, probes: Sequence[Probe], records: Sequence[str], batch_size: int = 32
) -> list[Likelihood]:
    """Score the answer of every probe after its prompt; rivals play no part.

    `records` names the probes for errors: a probe whose answer has no tokens but special ones and
    spaces, or that does not fit the model, raises EvaluationError. Broken logits give NaN.
    """
    texts = [(probe.prompt, probe.answer) for probe in probes]
    pairs = _encode(model, tokenizer, texts, records)
    with borrowed(model, tokenizer):
        found = score(model, pairs, fill=padding_id(tokenizer), rows=batch_size)
    return [Likelihood(pair.target, scored) for pair, scored in zip(pairs, found, strict=True)]


def answer_probes(
    model: Any, tokenizer: Any, probes: Sequence[Probe], records: Sequence[str], batch_size: int = 32
) -> list[Answer]:
    """Let the model answer every probe greedily, with as many new tokens as its answer has.

    Answers and rivals are scored first, in one go; as far as the model's likeliest tokens follow
    one of these texts, the pass that scored it has told what the model would generate, and only
    the prompts for which that is not enough are generated from.
    Raises EvaluationError as `score_answers` does, for rivals too.
    """
    ignored = meaningless_ids(tokenizer)
    texts = [(probe.prompt, probe.answer) for probe in probes]
    held = [i for i, probe in enumerate(probes) if probe.rival]
    pairs = _encode(
        model,
        tokenizer,
        [*texts, *((probes[i].prompt, probes[i].rival) for i in held)],
        [*records, *(f"{records[i]}, what the answer is held against" for i in held)],
    )
    with borrowed(model, tokenizer):
        found = score(model, pairs, fill=padding_id(tokenizer), rows=batch_size)
    likelihoods = [Likelihood(pair.target, scored) for pair, scored in zip(pairs, found, strict=True)]
    generated = _generate(model, tokenizer, pairs[: len(probes)], pairs, found, batch_size)
    rivals = dict(zip(held, likelihoods[len(probes) :], strict=True))
    return [
        Answer(
            None if said is None else tuple(said),
            _BROKEN if said is None else score_tokens(said, own.ids, ignored),
            own.probability - rivals[i].probability if i in rivals else None,
        )
        for i, (said, own) in enumerate(zip(generated, likelihoods[: len(probes)], strict=True))
    ]


def _encode(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], records: Sequence[str]) -> list[Pair]:
    """Encode prompts and answers; raises EvaluationError for an answer without tokens or a text too long."""
    ignored = meaningless_ids(tokenizer)
    pairs = encode_pairs(tokenizer, texts)
    for record, (prompt, answer), pair in zip(records, texts, pairs, strict=True):
        if ignored.issuperset(pair.target):
            raise EvaluationError(f"{record}: the answer {answer!r} to {prompt!r} has no tokens")
        check_length(model, len(pair.prompt) + len(pair.target), f"{record}: {prompt!r}")
    return pairs


def _generate(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Pair],
    pairs: Sequence[Pair],
    found: Sequence[Scored],
    batch_size: int,
) -> list[list[int] | None]:
    """Return the greedy continuation of each prompt of `asked`, as long as its target at most; None if broken."""
    stops = stop_ids(model, tokenizer)
    paths: defaultdict[tuple[int, ...], list[tuple[list[int], tuple[int, ...]]]] = defaultdict(list)
    for pair, scored in zip(pairs, found, strict=True):
        if math.isnan(scored.total):  # what it is said to say is no choice
            continue
        paths[tuple(pair.prompt)].append((pair.target, scored.said))
    known = [_read_off(paths[tuple(pair.prompt)], len(pair.target), stops) for pair in asked]
    missing = [i for i, said in enumerate(known) if said is None]
    budgets = [len(asked[i].target) for i in missing]
    said_of = continue_greedily(model, tokenizer, [asked[i].prompt for i in missing], budgets, batch_size)
    rest = dict(zip(missing, said_of, strict=True))
    return [rest[i] if said is None else said for i, said in enumerate(known)]


def _read_off(
    paths: Sequence[tuple[list[int], tuple[int, ...]]], budget: int, stops: Sequence[int]
) -> list[int] | None:
    """Return the greedy continuation of a prompt as far as scored texts tell it, None if they do not.

    `paths` are texts that were scored after the prompt, with the likeliest id at each place: that
    id is the model's own next one wherever the text before it is what the model said itself.
    """
    said: list[int] = []
    while len(said) < budget:
        token = next((own[len(said)] for ids, own in paths if ids[: len(said)] == said and len(ids) > len(said)), None)
        if token is None or token in stops:
            return None if token is None else said
        said.append(token)
    return said
