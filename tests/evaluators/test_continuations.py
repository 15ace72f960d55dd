"""Scoring of continuations against full passes over one text at a time, on every architecture."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from evaluators.continuations import Scored, score
from evaluators.encoding import Pair
from evaluators.reading import reading
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


def test_what_texts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    read: list[list[int]] = []
    forward = model.forward

    def count(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: bool = True) -> Any:
        read.extend(input_ids.tolist())
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", count)
    context = [0, *range(10, 60)]
    score(model, [Pair([0], [5])], fill=2)  # a model is looked at once before it is read
    read.clear()
    score(model, [Pair(context, [5, 6]), Pair(context, [7, 8]), Pair(context[:20], [9, 4]), Pair([0], [3])], fill=2)
    assert read == [[*context[:20], 9, *context[20:], 5, 7]]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_texts_longer_than_a_sliding_window_make_trees_too(family: str) -> None:
    model, pairs = tiny_model(family), some_pairs()
    with torch.no_grad():
        assert model.config.sliding_window < max(len(pair.prompt) for pair in pairs) < reading(model, 2).trees


def test_a_broken_text_leaves_the_others_of_its_tree_alone() -> None:
    model, pairs = tiny_model(), some_pairs()
    expected = score(model, pairs, fill=2)
    word = pairs[6].prompt[5]  # in no other pair
    assert sum(word in pair.prompt + pair.target for pair in pairs) == 1
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = math.nan
    got = score(model, pairs, fill=2)
    assert [math.isnan(s.total) for s in got] == [i == 6 for i in range(len(pairs))]
    assert [s.total for s in got[:6]] == pytest.approx([s.total for s in expected[:6]], abs=1e-5)


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
