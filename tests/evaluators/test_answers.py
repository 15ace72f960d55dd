"""Token-set scores: hand-made cases and properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators import EvaluationError
from evaluators.answers import Scores, score_tokens
from evaluators.encoding import encode_pairs, meaningless_ids

IDS = st.lists(st.integers(0, 12), max_size=8)
SOME_IDS = st.lists(st.integers(0, 12), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("generated", "target", "expected"),
    [
        ([5, 6], [5, 6], Scores(1, 1, 1)),
        ([6, 5], [5, 6], Scores(1, 1, 0)),  # sets forgive order
        ([5, 6, 9, 9], [5, 6], Scores(1, 1, 1)),  # what follows the answer is cut off
        ([9, 5, 6], [5, 6], Scores(0.5, 0.5, 0)),  # cut to {9, 5}
        ([5], [5, 6], Scores(2 / 3, 0.5, 0)),  # precision 1, recall 1/2
        ([5, 5], [5, 6], Scores(2 / 3, 0.5, 0)),
        ([7, 8], [5, 6], Scores(0, 0, 0)),
        ([], [5], Scores(0, 0, 0)),
        ([0, 5, 1, 6], [5, 0, 6], Scores(1, 1, 1)),  # 0 and 1 are ignored on both sides
    ],
)
def test_hand_made_cases(generated: list[int], target: list[int], expected: Scores) -> None:
    assert score_tokens(generated, target, {0, 1}) == pytest.approx(expected)


@pytest.mark.parametrize("target", [[], [0], [1, 0, 0]])
def test_a_target_with_nothing_in_it_is_an_error(target: list[int]) -> None:
    with pytest.raises(EvaluationError):
        score_tokens([5], target, {0, 1})


@given(generated=IDS, target=SOME_IDS)
def test_f1_is_the_harmonic_mean_of_counts(generated: list[int], target: list[int]) -> None:
    scores = score_tokens(generated, target)
    said, wanted = set(generated[: len(target)]), set(target)
    assert scores.f1 == pytest.approx(2 * len(said & wanted) / (len(said) + len(wanted)))
    assert scores.recall == pytest.approx(len(said & wanted) / len(wanted))
    assert scores.exact == (list(generated[: len(target)]) == target)


@given(generated=IDS, target=SOME_IDS)
def test_exact_implies_the_others(generated: list[int], target: list[int]) -> None:
    scores = score_tokens(generated, target)
    assert 0 <= scores.recall <= 1
    assert scores.f1 == 0 or scores.recall > 0
    if scores.exact:
        assert scores.f1 == scores.recall == 1


@given(target=SOME_IDS, after=IDS, data=st.data())
def test_f1_and_recall_ignore_order_and_what_follows(target: list[int], after: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(target))
    assert score_tokens([*shuffled, *after], target)[:2] == (1, 1)


@given(generated=IDS, target=SOME_IDS, noise=st.lists(st.sampled_from([13, 14]), max_size=4))
def test_ignored_ids_never_count(generated: list[int], target: list[int], noise: list[int]) -> None:
    plain = score_tokens(generated, target)
    assert score_tokens([*noise, *generated], [*target, *noise], {13, 14}) == plain


def test_special_tokens_and_the_bare_space_say_nothing(tokenizer: Any) -> None:
    (space,) = tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, space} <= meaningless_ids(tokenizer)
    assert not meaningless_ids(tokenizer) & set(tokenizer("Karth", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("prompt", ["Mira was born in", "Mira was born in "])
def test_pairs_put_one_space_between_prompt_and_target(tokenizer: Any, prompt: str) -> None:
    (pair,) = encode_pairs(tokenizer, [(prompt, "Karth")])
    assert tokenizer.decode(pair.prompt) == "<s>Mira was born in"
    assert tokenizer.decode(pair.target) == " Karth"
