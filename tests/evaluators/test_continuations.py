"""Scoring of continuations against full passes over one text at a time, on every architecture."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from evaluators.continuations import Scored, score
from evaluators.encoding import Pair
from tests.models import CONFIGS, VOCABULARY, tiny_model


def some_pairs() -> list[Pair]:
    """Pairs of differing lengths: lone contexts, contexts with several targets, one pair twice."""
    rng = random.Random(4)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    shared, other = [0, *ids(21)], [0, *ids(4)]
    pairs = [Pair(shared, ids(n)) for n in (1, 5, 3, 1)] + [Pair(other, ids(n)) for n in (2, 1)]
    pairs += [Pair([0, *ids(n)], ids(m)) for n, m in ((9, 4), (1, 1), (30, 2))]
    return [*pairs, pairs[1]]


def naive(model: Any, pair: Pair) -> Scored:
    """Score a pair with one full pass, neither padded nor cached."""
    ids = pair.prompt + pair.target
    with torch.no_grad():
        scores = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    places = range(len(pair.prompt) - 1, len(ids) - 1)
    total = sum(scores[i, ids[i + 1]].item() for i in places)
    return Scored(total, tuple(int(scores[i].argmax()) for i in places))


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_one_full_pass_for_each(family: str) -> None:
    model, pairs = tiny_model(family), some_pairs()
    expected = [naive(model, pair) for pair in pairs]
    for rows in (1, 3, 32):
        with torch.no_grad():
            got = score(model, pairs, fill=2, rows=rows)
        assert [s.total for s in got] == pytest.approx([s.total for s in expected], abs=1e-5, rel=2e-6)
        assert [s.greedy_ids for s in got] == [s.greedy_ids for s in expected]


def test_a_context_is_read_once_for_all_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    read: list[int] = []
    forward = model.forward

    def count(
        input_ids: Any, position_ids: Any = None, past_key_values: Any = None, logits_to_keep: int = 0, **rest: Any
    ) -> Any:
        read.append(input_ids.numel())
        kept = {"past_key_values": past_key_values, "logits_to_keep": logits_to_keep}
        return forward(input_ids=input_ids, position_ids=position_ids, **kept, **rest)

    monkeypatch.setattr(model, "forward", count)
    context = [0, *range(10, 60)]
    score(model, [Pair([0], [5])], fill=2)  # a model is looked at once before it is read
    read.clear()
    score(model, [Pair(context, [5, 6]), Pair(context, [7, 8]), Pair(context, [9])], fill=2)
    assert read == [51, 2]  # the context, then one token for each target of two


def test_a_forward_without_the_arguments_reads_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tiny_model(), some_pairs()
    expected = score(model, pairs, fill=2)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids: forward(input_ids=input_ids))
    got = score(model, pairs, fill=2)
    assert [s.total for s in got] == pytest.approx([s.total for s in expected], abs=1e-5)
    assert [s.greedy_ids for s in got] == [s.greedy_ids for s in expected]


def test_broken_logits_are_nan() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    assert all(math.isnan(s.total) for s in score(model, some_pairs(), fill=2))
