"""Two reports held against each other, and drift over many, without a run."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest

from pytest_lmcompose.baseline.compare import compare_reports
from pytest_lmcompose.baseline.drift import LEVEL, drifts, trend_p
from pytest_lmcompose.report.collect import SCHEMA_PATH
from pytest_lmcompose.report.compared import is_bad
from pytest_lmcompose.results import DriftRow, Row
from tests.plugin.documents import composition, measured, report, step, typed


def rows(old: dict[str, Any], new: dict[str, Any]) -> dict[tuple[str, str], Row]:
    found = compare_reports(typed(old), typed(new))
    assert found.problem is None
    return {(row.composition, row.metric): row for row in found.rows}


def answers(right: int, n: int = 40) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def test_the_documents_of_these_tests_are_in_the_schema() -> None:
    jsonschema.validate(report({"a": {"m": [1.0, 0.0]}}), json.loads(SCHEMA_PATH.read_text()))


def test_rows_are_paired_on_the_samples_and_corrected_for_each_other() -> None:
    old = {"recall": answers(38), "accuracy/hazardous": answers(2), "perplexity": [2.0, 3.0, 4.0], "edit_x": answers(9)}
    new = {"recall": answers(26), "accuracy/hazardous": answers(1), "perplexity": [2.0, 3.0, 4.0], "edit_x": answers(8)}
    found = rows(report({"a+b": old}), report({"a+b": new}))
    recall = found["a+b", "recall"]
    assert (recall.old, recall.new, recall.difference) == (38 / 40, 26 / 40, pytest.approx(-12 / 40))
    assert (recall.p, recall.p_holm, recall.verdict) == (2 * 0.5**12, pytest.approx(3 * 2 * 0.5**12), "worse")
    assert recall.stderr == pytest.approx((12 / 40 * 28 / 40 / 39) ** 0.5)
    hazardous = found["a+b", "accuracy/hazardous"]
    assert (hazardous.p, hazardous.p_holm, hazardous.verdict) == (1, 1, "same")
    equal = found["a+b", "perplexity"]
    assert (equal.p, equal.verdict, equal.difference) == (None, "equal", 0)


@pytest.mark.parametrize(("metric", "verdict"), [("recall", "better"), ("accuracy/hazardous", "worse")])
def test_more_is_better_or_worse(metric: str, verdict: str) -> None:
    found = rows(report({"a": {metric: answers(20)}}), report({"a": {metric: answers(35)}}))
    assert found["a", metric].verdict == verdict


def test_what_is_in_one_report_only() -> None:
    found = rows(report({"a": {"m": [1.0], "k": [1.0]}, "b": {"m": [1.0]}}), report({"a": {"m": [1.0], "l": [1.0]}}))
    assert {key: row.verdict for key, row in found.items()} == {
        ("a", "m"): "equal",
        ("a", "l"): "new",
        ("a", "k"): "gone",
        ("b", "m"): "gone",
    }


def test_what_cannot_be_paired_is_unknown() -> None:
    old, new = report({"a": {"recall": answers(9), "perplexity": answers(9)}}), report({"a": {}})
    asked = {**old["compositions"][0]["data"], "facts": "b"}
    new["compositions"] = [composition("a", {"recall": answers(9), "perplexity": answers(9, 41)}, data=asked)]
    found = rows(old, new)
    assert (found["a", "recall"].verdict, found["a", "recall"].note) == ("unknown", "different facts were used")
    assert "40 samples of the old run against 41" in found["a", "perplexity"].note
    broken = {**measured("m", [1.0, 2.0]), "value": None, "nonfinite": "nan"}
    record = composition("a", {}, measurements=[broken])
    found = rows(report({"a": {"m": [1.0, 2.0]}}), report({}, compositions=[record]))
    assert (found["a", "m"].verdict, found["a", "m"].note) == ("unknown", "not finite")


def test_other_samples_by_another_seed_are_compared_unpaired() -> None:
    old = report({"a": {"recall": answers(36)}})
    record = composition("a", {"recall": answers(18)}, data={**old["compositions"][0]["data"], "facts": "b"})
    found = rows(old, report({}, compositions=[record], seed=1))["a", "recall"]
    assert (found.verdict, found.note) == ("worse", "unpaired: different facts were used")
    error = (0.9 * 0.1 / 39 + 0.45 * 0.55 / 39) ** 0.5
    assert found.stderr == pytest.approx(error)
    assert found.p == pytest.approx(math.erfc(0.45 / error / math.sqrt(2)))


@pytest.mark.parametrize(("bits", "verdict"), [(4.5, "equal"), (4.25, "changed"), (4.75, "changed")])
def test_what_is_read_off_the_weights_has_no_noise(bits: float, verdict: str) -> None:
    def run(value: float) -> dict[str, Any]:
        read = {**measured("average_bits", [4.0, 8.0]), "value": value, "stderr": 0.0, "higher_is_better": False}
        return report({}, compositions=[composition("a", {}, measurements=[read])])

    found = rows(run(4.5), run(bits))["a", "average_bits"]
    assert (found.verdict, found.p, found.stderr) == (verdict, None, 0)


def test_what_is_read_off_the_weights_asks_nothing() -> None:
    def run(value: float, asked: str) -> dict[str, Any]:
        read = {**measured("average_bits", [4.0, 8.0]), "value": value, "stderr": 0.0, "higher_is_better": False}
        record = composition("a", {}, measurements=[read])
        record["data"] = {**record["data"], "questions": asked, "edits": asked}
        return report({}, compositions=[record], seed=int(asked))

    found = rows(run(4.0, "1"), run(6.8, "2"))["a", "average_bits"]
    assert (found.verdict, found.p, found.note) == ("changed", None, "")
    assert is_bad(found) and not is_bad(rows(run(6.8, "1"), run(4.0, "2"))["a", "average_bits"])


def test_a_metric_of_an_unknown_evaluator_needs_all_data_alike() -> None:
    old = report({"a": {"own": answers(9)}})
    record = composition("a", {"own": answers(8)})
    record["data"] = {**record["data"], "texts": "b"}
    assert rows(old, report({}, compositions=[record]))["a", "own"].note == "different texts were used"
    record["data"] = {**old["compositions"][0]["data"], "methods": "b"}
    assert rows(old, report({}, compositions=[record]))["a", "own"].verdict == "same"


@pytest.mark.parametrize(
    ("key", "value"), [("architecture", "GPT2LMHeadModel, 2 layers of width 8, vocabulary of 9"), ("parameters", 999)]
)
def test_another_architecture_is_not_compared(key: str, value: Any) -> None:
    old, new = report({"a": {"m": [1.0]}}), report({"a": {"m": [1.0]}})
    new["model"][key] = value
    found = compare_reports(typed(old), typed(new))
    assert found.problem is not None and str(value) in found.problem
    assert found.rows == ()


def test_circumstances_are_told() -> None:
    old, new = report({"a": {"m": [1.0]}}), report({"a": {"m": [1.0]}}, seed=3, repeats=2)
    old["recipe"]["evaluate"], new["recipe"]["evaluate"] = {"window": 128}, {"window": 64}
    old["recipe"]["world"], new["recipe"]["world"] = {"folder": "/here"}, {"folder": "/there"}
    for document, bits in ((old, 4), (new, 3)):
        document["compositions"][0]["steps"] = [
            step("awq", "compress") | {"settings": {"bits": bits, "group_size": 32}}
        ]
    new["model"]["weight_hash"] = "2" * 64
    new["environment"]["packages"] = {"torch": "2.14.0", "peft": "1.0"}
    assert [(d.what, d.message) for d in compare_reports(typed(old), typed(new)).differences] == [
        ("model", "weights: 111111111111 -> 222222222222"),
        ("seed", "seed 0 -> seed 3, 2 repeats"),
        ("settings", "evaluate.window: 128 -> 64"),
        ("settings", "awq: bits: 4 -> 3"),
        ("versions", "torch: 2.13.0 -> 2.14.0"),
        ("versions", "peft: none -> 1.0"),
    ]


def test_the_comparison_needs_no_torch_and_no_pytest() -> None:
    code = (
        "import sys; from pytest_lmcompose.baseline.compare import compare_reports; import tests.plugin.documents as d;"
        "compare_reports(d.typed(d.report({'a': {'m': [1., 0.]}})), d.typed(d.report({'a': {'m': [0., 1.]}})));"
        "assert not {'torch', 'transformers', 'hydra', 'pytest'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_p_of_a_trend_is_that_of_all_orders() -> None:
    generator = random.Random(0)
    for _ in range(20):
        values = [generator.randint(0, 3) for _ in range(generator.randint(3, 6))]

        def falls(row: tuple[int, ...]) -> int:
            return sum(row[i] > row[j] for i, j in itertools.combinations(range(len(row)), 2))

        orders = [falls(row) <= falls(tuple(values)) for row in itertools.permutations(values)]
        assert trend_p(values) == pytest.approx(sum(orders) / len(orders))


def test_the_p_of_a_long_trend_is_close_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    for high in (3, 1000):
        values = [generator.randint(0, high) + 0.01 * i * high for i in range(40)]
        exact = trend_p(values)
        monkeypatch.setattr("pytest_lmcompose.baseline.drift._EXACT", 10)
        assert trend_p(values) == pytest.approx(exact, rel=0.15)
        monkeypatch.undo()
    assert trend_p([0.5] * 60) == 1


def drifting(documents: list[dict[str, Any]]) -> list[DriftRow]:
    return drifts(list(map(typed, documents)))


def history(*values: float, metric: str = "recall", n: int = 1000) -> list[dict[str, Any]]:
    return [report({"a": {metric: answers(round(v * n), n)}}) for v in values]


def test_losses_that_no_two_runs_show_are_drift() -> None:
    slow = [0.9 - 0.002 * i for i in range(10)]
    (found,) = drifting(history(*slow))
    assert found.drifts and found.loss == pytest.approx(0.018) and len(found.values) == 10
    (better,) = drifting(history(*slow, metric="accuracy/hazardous"))
    assert not better.drifts and better.loss < 0
    (short,) = drifting(history(*slow[:4]))
    assert not short.drifts  # 1 in 24 is no alarm
    (same,) = drifting(history(*[0.9] * 10))
    assert not same.drifts and same.p == 1
    assert drifting(history(0.9, 0.8)) == []


def test_other_models_and_other_questions_are_no_part_of_a_course() -> None:
    documents = history(*[0.9 - 0.01 * i for i in range(8)])
    documents[1]["model"]["parameters"] = 7
    documents[2]["compositions"][0]["data"]["facts"] = "other"
    (found,) = drifting(documents)
    assert len(found.values) == 6
    documents[2]["seed"] = 5  # other facts by another seed: noise, and no other test
    assert len(drifting(documents)[0].values) == 7


def test_ten_noisy_runs_seldom_alarm() -> None:
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        table = generator.normal(0.9, 0.01, size=(10, 12)).round(2)  # ties, as in shares of few samples
        documents = [report({"a": {f"m{i}": [float(v)] for i, v in enumerate(row)}}) for row in table]
        alarms += any(row.drifts for row in drifting(documents))
    assert alarms <= 400 * LEVEL + 3 * (400 * LEVEL) ** 0.5
