"""How docs/prediction.py scores predictions against a measured run."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_lmcompose.prediction.records import Pair, Prediction
from tests.docs.test_docs import DOCS, module
from tests.plugin import documents


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    return module(DOCS / "prediction.py")


def test_only_significant_effects_count_and_what_is_not_told_is_neither_right_nor_wrong(scores: Any) -> None:
    steady, varied = [0.9, 0.8, 0.9, 0.8], [0.1, 0.9, 0.2, 0.8]
    report = documents.typed(
        documents.report(
            {
                "a+b": {"recall": steady, "edit_success_margin": steady},
                "b+a": {
                    "recall": [value - 0.5 + 0.01 * i for i, value in enumerate(steady)],
                    "edit_success_margin": varied,
                },
            }
        )
    )

    def results(gap: float | None) -> list[str]:
        told = tuple(Prediction("a", "b", promise, gap, 0.1) for promise in ("recall", "edit", "unlearn"))
        pairs = [Pair("a", "b", told, None, None, (0, 0)), Pair("a", "c", told, None, None, (0, 0))]
        return [found.result for found in scores.score([pair.plain() for pair in pairs], report)]

    assert [results(gap) for gap in (0.5, -0.5, 0.01, None)] == [["right"], ["wrong"], ["cannot tell"], ["cannot tell"]]


def test_the_share_is_that_of_the_told_with_its_exact_interval(scores: Any) -> None:
    found = [scores.Scored("edit", "a+b", 0.1, result) for result in ("right",) * 9 + ("wrong", "cannot tell")]
    table = {row[0]: row[1:] for row in scores.rows(found)}
    assert table["edit"] == table["all but bits"] == ("11", "9", "1", "1", "0.90 (0.55 to 1.00)")
    assert table["recall"] == ("0", "0", "0", "0", "-")


def test_effects_of_one_run_are_looked_up_in_the_other(scores: Any) -> None:
    low, high = [0.1, 0.2, 0.1, 0.2], [0.9, 0.8, 0.9, 0.81]

    def report(better: str, worse: str) -> Any:
        return documents.typed(
            documents.report(
                {
                    better: {"recall": high, "edit_success_margin": high},
                    worse: {"recall": low, "edit_success_margin": high},
                    "a+c": {"recall": high},
                }
            )
        )

    one, other = report("a+b", "b+a"), report("b+a", "a+b")
    assert list(scores.again(one, one)) == [("recall", "a+b, b+a", "same sign")]
    assert list(scores.again(one, other)) == [("recall", "a+b, b+a", "opposite sign")]
