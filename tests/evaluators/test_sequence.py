"""The success of edits by when they were made in a sequence of batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from evaluators import EditCase
from evaluators.data import EvaluationData
from evaluators.editing import evaluate
from evaluators.measurement import Measurement
from evaluators.metrics import find_metric
from evaluators.settings import NoSettings
from evaluators.survival import measure_sequence
from pytest_lmcompose.measure import last_sequence


def test_success_is_split_by_when_edits_were_made() -> None:
    success = Measurement.mean("edit_success_exact", [1, 0, 1, 1, 1], answers=list("abcde"))
    found = {m.metric: m for m in measure_sequence(success, [2, 2, 1])}
    assert {name: m.samples for name, m in found.items()} == {
        "edit_survival/1-2": (1, 0),
        "edit_survival/3-4": (1, 1),
        "edit_survival/5": (1,),
    }
    assert found["edit_survival/1-2"].stderr == pytest.approx(0.5)
    assert found["edit_survival/3-4"].answers == ("c", "d")
    assert find_metric("edit_survival/1-2").targeted_by == ("edit",)
    assert not measure_sequence(success, [5]) and not measure_sequence(success, [])
    assert not measure_sequence(success, [2, 2])  # a step that made other edits than those measured


@pytest.mark.parametrize(("batches", "size"), [(11, 1), (23, 1), (37, 3)])
def test_many_batches_make_ten_points_of_whole_batches(batches: int, size: int) -> None:
    success = Measurement.mean("edit_success_exact", [float(n) for n in range(batches * size)])
    found = measure_sequence(success, [size] * batches)
    assert len(found) == 10
    assert [sample for m in found for sample in m.samples] == list(success.samples)
    assert all(m.n % size == 0 for m in found)


def test_the_evaluator_reports_the_curve_of_the_last_editing_step(bigram: Any, word_tokenizer: Any) -> None:
    cases = tuple(EditCase(name, f"{name} capital", city) for name, city in (("Ada", "Rome"), ("Bela", "Oslo")))
    steps: Any = [SimpleNamespace(report=SimpleNamespace(details=details)) for details in ({"sequence": [1, 1]}, {})]
    data = EvaluationData(cases, (), (), 4, sequence=last_sequence(steps))
    found = {m.metric: m.value for m in evaluate(bigram({"capital": "Oslo"}), word_tokenizer, NoSettings(), data)}
    assert (found["edit_survival/1"], found["edit_survival/2"]) == (0.0, 1.0)
    assert last_sequence(steps[1:]) == ()
