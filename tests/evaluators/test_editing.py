"""Edit metrics on a model that says what it is told to say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from evaluators import (
    EditCase,
    EvaluationError,
    Fact,
    Probe,
    capture_unedited,
    measure_editing,
    measure_recall,
)

CASES = [
    EditCase("Ada", "Ada capital", "New York", ("Ada was capital", "Ada likes"), (Probe("Bela born", "Oslo"),)),
    EditCase("Cato", "Cato in", "Oslo", ("Cato was in",), (Probe("Bela likes", "tea"), Probe("Ada born", "Oslo"))),
]
BEFORE = {"capital": "Rome", "in": "Rome", "born": "Oslo", "likes": "tea"}


def test_hand_computed_values(bigram: Any, word_tokenizer: Any) -> None:
    before = bigram(BEFORE)
    unedited = capture_unedited(before, word_tokenizer, CASES)
    # The edit took after "capital" but stopped after its first word; "born" changed on the way.
    after = bigram(BEFORE | {"capital": "New", "New": "tea", "in": "Oslo", "born": "Rome"})
    found = {m.metric: m for m in measure_editing(after, word_tokenizer, CASES, unedited=unedited)}
    # case 0: said {New, tea} of {New, York}: precision 1/2, recall 1/2; case 1: right
    assert found["edit_success_f1"].samples == pytest.approx((0.5, 1.0))
    assert found["edit_success_recall"].samples == (0.5, 1.0)
    assert found["edit_success_exact"].samples == (0.0, 1.0)
    # "likes" says "tea", and "tea" is followed by id 0, which is <s> and says nothing
    assert found["edit_paraphrase_f1"].samples == pytest.approx((0.5, 0.0, 1.0))
    assert found["edit_paraphrase_exact"].value == pytest.approx(1 / 3)
    assert found["edit_locality_exact"].samples == (0.0, 1.0, 0.0)
    assert found["edit_locality_agreement"].samples == (0.0, 1.0, 0.0)
    assert all(m.higher_is_better for m in found.values())
    assert len(found) == 10


def test_agreement_counts_wrong_answers_that_stayed(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram(BEFORE | {"likes": "Rome"})
    unedited = capture_unedited(model, word_tokenizer, CASES)
    found = {m.metric: m.value for m in measure_editing(model, word_tokenizer, CASES, unedited=unedited)}
    assert found["edit_locality_exact"] == pytest.approx(2 / 3)
    assert found["edit_locality_agreement"] == 1.0


def test_prompts_of_one_edit_are_one_cluster(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"in": "Oslo"})
    same = [
        EditCase("Ada", "Ada in", "Oslo", ("Ada was in",) * 10),
        EditCase("Bela", "Bela in", "Rome", ("Bela was in",) * 10),
    ]
    (paraphrase,) = (m for m in measure_editing(model, word_tokenizer, same) if m.metric == "edit_paraphrase_exact")
    assert (paraphrase.n, paraphrase.value) == (20, 0.5)
    assert paraphrase.stderr == pytest.approx(0.5)  # two edits, not twenty: sqrt(0.5 / 2)


def test_aspects_without_prompts_are_left_out(bigram: Any, word_tokenizer: Any) -> None:
    found = measure_editing(bigram({"in": "Oslo"}), word_tokenizer, [EditCase("Ada", "Ada in", "Oslo")])
    assert [m.metric for m in found] == ["edit_success_f1", "edit_success_recall", "edit_success_exact"]
    assert found[2].value == 1.0 and found[2].stderr is None


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_batch_size_changes_nothing(model: Any, tokenizer: Any, batch_size: int) -> None:
    cases = [
        EditCase(
            name,
            f"{name} was born in",
            "Karth harbour",
            (f"The city of {name} is",),
            (Probe(f"the old river {name}", "Dren"),),
        )
        for name in ("Mira", "Tolvan the glass blower", "Os")
    ]
    unedited = capture_unedited(model, tokenizer, cases, batch_size=3)
    expected = measure_editing(model, tokenizer, cases, unedited=unedited, batch_size=4)
    assert measure_editing(model, tokenizer, cases, unedited=unedited, batch_size=batch_size) == expected


def test_leaves_model_and_tokenizer_as_found(model: Any, tokenizer: Any, unchanged: Callable[..., None]) -> None:
    def measure() -> None:
        measure_editing(model, tokenizer, CASES, unedited=capture_unedited(model, tokenizer, CASES))

    unchanged(model, tokenizer, measure)


def test_errors_name_the_record(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram(BEFORE)
    with pytest.raises(EvaluationError, match="no cases"):
        measure_editing(model, word_tokenizer, [])
    empty = [*CASES, EditCase("Bela", "Bela in", " ")]
    with pytest.raises(EvaluationError, match=r"case 2 \(Bela\), prompt: the answer ' ' to 'Bela in'"):
        measure_editing(model, word_tokenizer, empty)
    special = [EditCase("Bela", "Bela in", "Rome", (), (Probe("Ada in", "</s>"),))]
    with pytest.raises(EvaluationError, match=r"case 0 \(Bela\), locality prompt 0"):
        capture_unedited(model, word_tokenizer, special)
    unedited = capture_unedited(model, word_tokenizer, CASES[:1])
    with pytest.raises(EvaluationError, match=r"case 1 \(Cato\), locality prompt 0: the unedited model was not"):
        measure_editing(model, word_tokenizer, CASES, unedited=unedited)


def test_recall_overall_and_by_relation(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"capital": "New", "New": "York", "born": "Oslo"})
    facts = [
        Fact("Ada capital", "New York", "capital", "train"),
        Fact("Ada born", "Rome", "born", "train"),
        Fact("Bela born", "Oslo", "born", "heldout"),
        Fact("Bela capital", "York New", "capital", "heldout"),  # the right words in the wrong order
        Fact("Cato was born", "Oslo", "born", "heldout"),
    ]
    found = measure_recall(model, word_tokenizer, facts)
    assert [m.metric for m in found] == ["recall", "recall/born", "recall/capital"]
    assert found[0].samples == (1.0, 0.0, 1.0, 0.0, 1.0)
    assert found[1].samples == (0.0, 1.0, 1.0)
    assert found[2].samples == (1.0, 0.0)
    assert found[0].stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_recall_errors_name_the_fact(bigram: Any, word_tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="no facts"):
        measure_recall(bigram({}), word_tokenizer, [])
    with pytest.raises(EvaluationError, match=r"fact 1: .*'Bela born'"):
        measure_recall(bigram({}), word_tokenizer, [Fact("Ada born", "Rome", "born"), Fact("Bela born", "", "born")])
