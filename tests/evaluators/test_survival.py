"""Survival of a metric: ratios and their errors."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from evaluators import EvaluationError, Measurement, measure_survival


def test_hand_computed() -> None:
    after = Measurement.mean("edit_success_exact", [1.0, 1.0, 1.0, 0.0])
    end = Measurement.mean("edit_success_exact", [1.0, 0.0, 1.0, 0.0])
    found = measure_survival(after, end)
    assert (found.metric, found.n, found.higher_is_better) == ("survival/edit_success_exact", 4, True)
    assert found.value == pytest.approx(2 / 3)
    squares = sum((y - 2 / 3 * x) ** 2 for x, y in zip(after.samples, end.samples, strict=True))
    assert found.stderr == pytest.approx(math.sqrt(4 / 3 * squares) / 3)
    assert measure_survival(after, after).value == 1 and measure_survival(after, after).stderr == 0


def test_the_error_is_that_of_paired_samples() -> None:
    """Against the spread of the ratio over many draws of edits."""
    rng = random.Random(0)

    def draw() -> Measurement:
        before = [float(rng.random() < 0.9) for _ in range(100)]
        later = [x if rng.random() < 0.8 else 0.0 for x in before]
        return measure_survival(Measurement.mean("m", before), Measurement.mean("m", later))

    drawn = [draw() for _ in range(400)]
    spread = statistics.stdev(m.value for m in drawn)
    assert statistics.fmean(m.stderr or 0 for m in drawn) == pytest.approx(spread, rel=0.1)


def test_prompts_of_one_edit_are_one_cluster() -> None:
    once = measure_survival(Measurement.mean("m", [1.0, 0.5, 1.0]), Measurement.mean("m", [0.5, 0.5, 1.0]))
    twice = measure_survival(
        Measurement.mean("m", [1.0, 0.5, 1.0] * 2),
        Measurement.mean("m", [0.5, 0.5, 1.0] * 2),
        clusters=[0, 1, 2] * 2,
    )
    assert twice.value == once.value and twice.stderr == pytest.approx(once.stderr)
    after, end = (
        Measurement.mean("m", samples * 2, clusters=[0, 1, 2] * 2) for samples in ([1.0, 0.5, 1.0], [0.5, 0.5, 1.0])
    )
    assert measure_survival(after, end) == twice


def test_perplexities_combine_their_errors() -> None:
    after = Measurement("perplexity", 10.0, 0.5, 3, False, (2.0, 2.3, 2.6))
    end = Measurement("perplexity", 12.0, 0.9, 3, False, (2.2, 2.5, 2.8))
    found = measure_survival(after, end)
    assert (found.value, found.higher_is_better) == (pytest.approx(1.2), False)
    assert found.stderr == pytest.approx(1.2 * math.hypot(0.05, 0.075))
    assert "independent" in found.note


def test_nothing_survives_of_nothing() -> None:
    none, some = Measurement.mean("m", [0.0, 0.0]), Measurement.mean("m", [1.0, 0.0])
    assert math.isnan(measure_survival(none, some).value)
    assert measure_survival(some, none).value == 0
    broken = Measurement("m", math.nan, None, 2, True, (math.nan, 1.0))
    assert math.isnan(measure_survival(some, broken).value)


def test_only_like_is_compared_with_like() -> None:
    one = Measurement.mean("m", [1.0, 0.0])
    with pytest.raises(EvaluationError, match="m right after its step, but k at the end"):
        measure_survival(one, Measurement.mean("k", [1.0, 0.0]))
    with pytest.raises(EvaluationError, match="2 samples right after its step, 3 at the end"):
        measure_survival(one, Measurement.mean("m", [1.0, 0.0, 0.0]))
