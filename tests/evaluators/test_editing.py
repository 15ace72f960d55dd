"""Edit metrics on a model that says what it is told to say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluators import (
    EditCase,
    EvaluationError,
    Fact,
    Probe,
    capture_unedited,
    greedy,
    measure_editing,
    measure_recall,
)
from evaluators.answers import Likelihood, _read_off, answer_probes
from evaluators.continuations import score
from evaluators.encoding import Pair, encode_pairs
from evaluators.measurement import Measurement
from evaluators.metrics import find_metric
from pytest_lmcompose.gate.repeats import pooled

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
    assert found["edit_paraphrase_exact"].value == pytest.approx(1 / 2)  # of the first edit 0, of the second 1
    locality = found["edit_locality_exact"]
    assert locality.samples == (0.0, 1.0, 0.0) and locality.weights == (1, 0.5, 0.5)
    assert (locality.value, locality.stderr) == pytest.approx((0.25, 0.25))  # two edits, 0 and 1/2
    assert found["edit_success_exact"].clusters == ()  # a prompt an edit
    assert found["edit_paraphrase_exact"].clusters == (0, 0, 1)
    assert found["edit_locality_agreement"].clusters == (0, 1, 1)
    assert found["edit_locality_agreement"].samples == (0.0, 1.0, 0.0)
    assert all(m.higher_is_better for m in found.values())
    assert not [m for m in found if m.startswith("edit_success_margin")], "no old answers are known"
    assert len(found) == 12  # three aspects of three, two for locality's margin, agreement


def test_margins_are_differences_of_probabilities_by_token(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"capital": "New", "New": "York", "born": "Oslo"})
    cases = [
        EditCase(
            "Ada",
            "Ada capital",
            "New York",
            ("Ada was capital", "Ada likes"),
            (Probe("Bela born", "Oslo"), Probe("Bela capital", "New York")),
            (Probe("Ada was born in", "Oslo", "Rome"), Probe("Bela born", "tea", "Oslo")),
            truth="Rome",
        ),
        EditCase("Cato", "Cato in", "Oslo", truth="Oslo"),
    ]
    found = {m.metric: m for m in measure_editing(model, word_tokenizer, cases)}
    others = len(word_tokenizer) - 1
    high, low, flat = math.exp(4) / (math.exp(4) + others), 1 / (math.exp(4) + others), 1 / (others + 1)
    # Case 1 is no test of its target: the old answer is the same.
    assert found["edit_success_margin"].samples == pytest.approx((high - low,), rel=1e-5)
    # After "likes" all words are as likely; then New, given, makes York likely: a geometric mean.
    assert found["edit_paraphrase_margin"].samples == pytest.approx(
        (high - low, math.sqrt(flat * high) - flat), rel=1e-5
    )
    assert found["edit_portability_margin"].samples == pytest.approx((0.0, low - high), abs=1e-6)
    assert found["edit_portability_preferred"].value == 0.0
    assert found["edit_portability_exact"].samples == (0.0, 0.0)
    # What was true against the edit's target; the second prompt's answer is that target.
    assert found["edit_locality_margin"].samples == pytest.approx((high - math.sqrt(low * high),), rel=1e-5)
    assert found["edit_locality_preferred"].samples == (1.0,)
    assert "1 of 2 prompts" in found["edit_locality_margin"].note
    assert "geometric mean" in found["edit_success_margin"].note


def test_what_is_said_equals_greedy_generation(model: Any, tokenizer: Any) -> None:
    """Right, half right and wrong answers, with and without rivals: read off or generated, it is the same."""
    rng = random.Random(1)
    prompts = [f"{name} was born in" for name in ("Mira", "Tolvan", "Os", "Karth", "The old", "Ulm")]
    said = greedy(model, tokenizer, prompts, 6)
    probes = []
    for prompt, ids in zip(prompts, said, strict=True):
        true = tokenizer.decode(ids).strip()
        probes += [
            Probe(prompt, "Dren", true or "Ulm"),
            Probe(prompt, f"{true[:3]}x salt"),
            Probe(prompt, "the salt lakes", rng.choice(("Dren", "Ulm"))),
        ]
    answers = answer_probes(model, tokenizer, probes, [str(i) for i in range(len(probes))])
    budgets = [len(pair.target) for pair in encode_pairs(tokenizer, [(p.prompt, p.answer) for p in probes])]
    expected = greedy(model, tokenizer, [p.prompt for p in probes], budgets)
    assert [list(answer.generated) for answer in answers] == expected
    assert [answer.margin is None for answer in answers] == [not probe.rival for probe in probes]


@pytest.mark.parametrize(
    ("paths", "budget", "said"),
    [
        ([([5, 6], (5, 6))], 2, [5, 6]),
        ([([5, 6], (5, 9))], 2, [5, 9]),
        ([([5, 6], (8, 6))], 2, None),  # what comes after 8 nobody scored
        ([([5, 6], (8, 6)), ([8], (8,))], 2, None),
        ([([5, 6], (8, 6)), ([8, 4], (8, 3))], 2, [8, 3]),
        ([([5, 6], (1, 6))], 2, []),  # 1 ends the text
        ([([5, 6, 7], (5, 1, 7))], 3, [5]),
        ([], 0, []),
    ],
)
def test_reading_off(paths: list[Any], budget: int, said: list[int] | None) -> None:
    assert _read_off(paths, budget, stops=[1]) == said


def test_nan_logits_are_no_answer(model: Any, tokenizer: Any) -> None:
    unedited = capture_unedited(model, tokenizer, CASES)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    found = measure_editing(model, tokenizer, CASES, unedited=unedited)
    found += measure_recall(model, tokenizer, [Fact("Ada was", "Rome", "x")])
    assert len(found) > 10 and all(math.isnan(m.value) for m in found)
    with pytest.raises(EvaluationError, match=r"the unedited model's logits after .* are NaN or infinite"):
        capture_unedited(model, tokenizer, CASES)


def test_only_the_prompts_whose_logits_are_nan_have_no_answer(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram({"likes": "tea"})
    with torch.no_grad():  # only the embedding of one word is broken
        model.model.embed_tokens.weight[word_tokenizer.convert_tokens_to_ids("Oslo")] = float("nan")
    cases = [EditCase("Ada", "Ada likes", "tea"), EditCase("Oslo", "Oslo likes", "tea")]
    exact = {m.metric: m for m in measure_editing(model, word_tokenizer, cases)}["edit_success_exact"]
    assert exact.samples[0] == 1 and math.isnan(exact.samples[1]) and math.isnan(exact.value)


def test_agreement_counts_wrong_answers_that_stayed(bigram: Any, word_tokenizer: Any) -> None:
    model = bigram(BEFORE | {"likes": "Rome"})
    unedited = capture_unedited(model, word_tokenizer, CASES)
    found = {m.metric: m.value for m in measure_editing(model, word_tokenizer, CASES, unedited=unedited)}
    assert found["edit_locality_exact"] == pytest.approx(3 / 4)
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


def test_kinds_of_prompts_are_also_measured_alone(bigram: Any, word_tokenizer: Any) -> None:
    hops = (Probe("Ada likes", "tea", kind="Reasoning"), Probe("Ada born", "Oslo", kind="Alias"))
    cases = [EditCase("Ada", "Ada in", "Oslo", portability=hops), EditCase("Bela", "Bela in", "Rome", (), hops[:1])]
    model = bigram(BEFORE | {"likes": "Rome"})
    unedited = capture_unedited(model, word_tokenizer, cases)
    found = {m.metric: m.value for m in measure_editing(model, word_tokenizer, cases, unedited=unedited)}
    kinds = ("edit_portability_exact", "edit_portability_exact/Reasoning", "edit_portability_exact/Alias")
    assert [found[name] for name in kinds] == [0.5, 0, 1]
    assert found["edit_locality_exact/Reasoning"] == 0 and found["edit_locality_agreement"] == 1
    assert find_metric("edit_portability_exact/Alias").data == "edits"


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
    got = measure_editing(model, tokenizer, cases, unedited=unedited, batch_size=batch_size)
    assert [m.metric for m in got] == [m.metric for m in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.samples == pytest.approx(other.samples, abs=1e-6)


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
    held = [EditCase("Bela", "Bela in", "Rome", truth="</s>")]
    with pytest.raises(EvaluationError, match=r"case 0 \(Bela\), prompt, the rival answer: .*'</s>'"):
        measure_editing(model, word_tokenizer, held)
    unedited = capture_unedited(model, word_tokenizer, CASES[:1])
    with pytest.raises(EvaluationError, match=r"case 1 \(Cato\), locality prompt 0: no answer of the unedited model"):
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


def test_recall_equals_generation(model: Any, tokenizer: Any) -> None:
    prompts = [f"{name} was born in" for name in ("Mira", "Tolvan", "Os", "Karth", "The old", "Ulm")]
    pairs = encode_pairs(tokenizer, [(prompt, "Dren and the salt") for prompt in prompts])
    said = greedy(model, tokenizer, prompts, 4)
    # As if the answers had been what the model says, wholly, up to the last token, or not at all.
    answers = [ids if k % 3 == 0 else [*ids[:-1], 3] if k % 3 == 1 else pairs[k].target for k, ids in enumerate(said)]
    found = score(model, [Pair(p.prompt, ids) for p, ids in zip(pairs, answers, strict=True)], fill=2)
    facts = [Fact(prompt, "x", "born") for prompt in prompts]
    scored = [Likelihood(ids, s) for ids, s in zip(answers, found, strict=True)]
    recall = measure_recall(model, tokenizer, facts, scored=scored)[0]
    expected = [float(greedy(model, tokenizer, [p], len(a))[0] == a) for p, a in zip(prompts, answers, strict=True)]
    assert list(recall.samples) == expected
    assert {0.0, 1.0} == set(expected)


def test_recall_errors_name_the_fact(bigram: Any, word_tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="no facts"):
        measure_recall(bigram({}), word_tokenizer, [])
    with pytest.raises(EvaluationError, match=r"fact 1: .*'Bela born'"):
        measure_recall(bigram({}), word_tokenizer, [Fact("Ada born", "Rome", "born"), Fact("Bela born", "", "born")])


def test_measurements_keep_what_the_model_said(bigram: Any, word_tokenizer: Any) -> None:
    after = bigram(BEFORE | {"capital": "New", "New": "tea", "in": "Oslo", "born": "Rome"})
    found = {m.metric: m for m in measure_editing(after, word_tokenizer, CASES)}
    assert found["edit_success_exact"].answers[0] == "New tea"
    assert len(found["edit_locality_exact"].answers) == found["edit_locality_exact"].n
    assert found["edit_success_f1"].answers == ()


def test_repeats_of_edits_with_and_without_weights_are_pooled() -> None:
    """In one repeat every edit has as many prompts, in the other not."""
    even = Measurement.mean("m", [0.0, 1.0], clusters=[0, 1])
    uneven = Measurement.mean("m", [0.0, 1.0, 1.0], clusters=[0, 1, 1], weights=(1, 0.5, 0.5))
    (found,) = pooled([[even], [uneven]])
    assert (found.value, found.weights) == (0.5, (1, 1, 1, 0.5, 0.5))
    assert found.stderr is not None and len(found.clusters) == found.n == 5
