"""Ask a model for short answers and compare them, token by token, with what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

from evaluators.encoding import encode_pairs, meaningless_ids
from evaluators.generation import greedy
from evaluators.measurement import EvaluationError


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer it should get; the answer carries no leading space."""

    prompt: str
    answer: str


class Scores(NamedTuple):
    """How well an answer agrees with its target: each in 0 to 1."""

    f1: float
    recall: float
    exact: float


class Answer(NamedTuple):
    """What the model said: the generated ids as they came, and their scores."""

    generated: tuple[int, ...]
    scores: Scores


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


def answer_probes(
    model: Any, tokenizer: Any, probes: Sequence[Probe], records: Sequence[str], batch_size: int = 32
) -> list[Answer]:
    """Let the model answer every probe greedily, with as many new tokens as its answer has.

    `records` names the probes for errors: a probe whose answer has no tokens but special ones and
    spaces raises EvaluationError.
    """
    ignored = meaningless_ids(tokenizer)
    pairs = encode_pairs(tokenizer, [(probe.prompt, probe.answer) for probe in probes])
    for record, probe, pair in zip(records, probes, pairs, strict=True):
        if ignored.issuperset(pair.target):
            raise EvaluationError(f"{record}: the answer {probe.answer!r} to {probe.prompt!r} has no tokens")
    prompts = [probe.prompt.rstrip(" ") for probe in probes]
    generated = greedy(model, tokenizer, prompts, [len(pair.target) for pair in pairs], batch_size)
    return [
        Answer(tuple(ids), score_tokens(ids, pair.target, ignored)) for ids, pair in zip(generated, pairs, strict=True)
    ]
