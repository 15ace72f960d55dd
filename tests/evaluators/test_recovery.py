"""The share of removed knowledge that comes back."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from evaluators import EvaluationError, Measurement, returned


def _accuracy(samples: list[int], metric: str = "accuracy/hazardous") -> Measurement:
    return Measurement.mean(metric, samples, higher_is_better=False)


def test_share_of_what_was_removed() -> None:
    base, after, end = ([1] * k + [0] * (20 - k) for k in (18, 6, 15))
    found = returned(_accuracy(base), _accuracy(after), _accuracy(end))
    assert found.metric == "returned/accuracy/hazardous"
    assert found.value == pytest.approx((15 - 6) / (18 - 6))
    assert not found.higher_is_better
    assert found.n == 20


def test_nothing_and_everything() -> None:
    base, after = _accuracy([1] * 10), _accuracy([1, 0] * 5)
    assert returned(base, after, after).value == 0.0
    assert returned(base, after, base).value == 1.0
    assert returned(base, after, base).stderr == pytest.approx(0.0)


def test_error_is_that_of_repeated_draws() -> None:
    rng = random.Random(0)

    def draw() -> Measurement:
        base = [rng.random() < 0.9 for _ in range(150)]
        after = [known and rng.random() < 0.3 for known in base]
        end = [(known and rng.random() < 0.5) or left for known, left in zip(base, after, strict=True)]
        return returned(*(_accuracy([int(x) for x in samples]) for samples in (base, after, end)))

    drawn = [draw() for _ in range(400)]
    spread = statistics.stdev(m.value for m in drawn)
    assert statistics.fmean(m.stderr or 0.0 for m in drawn) == pytest.approx(spread, rel=0.1)


def test_samples_of_one_cluster_add_no_certainty() -> None:
    def state(samples: list[float], copies: int) -> Measurement:
        return Measurement.mean("m", samples * copies, clusters=list(range(len(samples))) * copies)

    one, three = (returned(state([1, 1, 1], k), state([0, 1, 0], k), state([1, 1, 0], k)) for k in (1, 3))
    assert three.value == one.value == 0.5
    assert three.stderr == pytest.approx(one.stderr)


def test_where_nothing_was_removed_there_is_no_share() -> None:
    found = returned(_accuracy([1, 0]), _accuracy([1, 0]), _accuracy([1, 1]))
    assert math.isnan(found.value)
    assert found.stderr is None
    assert "removed nothing" in found.note


def test_states_must_be_measured_alike() -> None:
    one = _accuracy([1, 0])
    with pytest.raises(EvaluationError, match="different metrics"):
        returned(one, _accuracy([1, 0], "accuracy/harmless"), one)
    with pytest.raises(EvaluationError, match="2, 3, 2 samples"):
        returned(one, _accuracy([1, 0, 0]), one)
    perplexity = Measurement("perplexity", 9.0, 0.1, 2, False, (2.0, 2.2))
    with pytest.raises(EvaluationError, match="not the mean"):
        returned(perplexity, perplexity, perplexity)
