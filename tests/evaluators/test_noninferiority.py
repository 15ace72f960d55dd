"""Non-inferiority: the bound against the likelihood itself, its level, its power, and the samples it asks for."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar

from evaluators.measurement import EvaluationError
from evaluators.noninferiority import NonInferiority, non_inferiority, score, score_bound

bound = cache(score_bound)


def binary(losses: int, gains: int, n: int, margin: float = 0.05) -> NonInferiority:
    before = [1.0] * losses + [0.0] * gains + [1.0] * (n - losses - gains)
    after = [0.0] * losses + [1.0] * gains + [1.0] * (n - losses - gains)
    return non_inferiority(before, after, higher_is_better=True, margin=margin)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60), st.floats(0.01, 0.5))
def test_the_statistic_is_the_score_at_the_most_likely_shares(losses: int, gains: int, same: int, share: float) -> None:
    n = losses + gains + same

    def unlikely(gained: float) -> float:
        lost = gained + share
        return -float(stats.multinomial.logpmf([losses, gains, same], n, [lost, gained, max(0.0, 1 - lost - gained)]))

    gained = float(minimize_scalar(unlikely, bounds=(0, (1 - share) / 2), method="bounded", options={"xatol": 1e-10}).x)
    variance = n * (2 * gained + share - share**2)  # of losses - gains, whose expectation is n * share
    assert score(losses, gains, n, share) == pytest.approx((losses - gains - n * share) / variance**0.5, abs=1e-3)


@pytest.mark.parametrize("churn", [0.0, 0.02, 0.1])
def test_the_level_holds_and_the_count_of_samples_gives_the_power(churn: float) -> None:
    generator = np.random.default_rng(0)
    margin = 0.05
    lost = generator.multinomial(200, [margin + churn / 2, churn / 2, 1 - margin - churn], size=10_000)
    assert np.mean([bound(int(b), int(c), 200, 0.05) < margin for b, c, _ in lost]) <= 0.06
    needed = binary(round(500 * churn), round(500 * churn), 1000, margin).needed
    assert needed is not None
    even = generator.multinomial(needed, [churn / 2, churn / 2, 1 - churn], size=4_000)
    power = np.mean([bound(int(b), int(c), needed, 0.05) < margin for b, c, _ in even])
    assert power >= 0.76


def test_other_samples_take_the_bound_of_the_t_distribution() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.normal(size=(2, 30))
    for better, drops in ((True, before - after), (False, after - before)):
        found = non_inferiority(before, after, higher_is_better=better, margin=0.1, level=0.1)
        upper = stats.ttest_1samp(drops, 0, alternative="less").confidence_interval(0.9).high
        assert (found.test, found.upper) == ("paired t", pytest.approx(upper, rel=1e-9))
    grouped = non_inferiority(
        np.repeat(before, 3),
        np.repeat(after, 3),
        higher_is_better=True,
        margin=0.1,
        clusters=[i // 3 for i in range(90)],
    )
    alone = non_inferiority(before, after, higher_is_better=True, margin=0.1)
    assert (grouped.units, grouped.upper) == (30, pytest.approx(alone.upper, rel=1e-9))


def test_the_t_tests_count_of_samples_gives_the_power() -> None:
    generator = np.random.default_rng(2)
    needed = non_inferiority([0.0] * 400, generator.normal(size=400), higher_is_better=True, margin=0.3).needed
    assert needed is not None
    draws = generator.normal(size=(3_000, needed))
    drops = draws.mean(axis=1) + stats.t.isf(0.05, needed - 1) * draws.std(axis=1, ddof=1) / math.sqrt(needed)
    assert np.mean(drops < 0.3) == pytest.approx(0.8, abs=0.05)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 40))
def test_the_bound_grows_with_losses_and_lies_above_the_loss(losses: int, gains: int, same: int) -> None:
    n = losses + gains + same + 1
    here, more = bound(losses, gains, n, 0.05), bound(losses + 1, gains, n, 0.05)
    assert (losses - gains) / n <= here <= 1
    assert here <= more + 1e-9
    assert bound(losses, gains, n, 0.01) >= here - 1e-9


def test_few_samples_are_no_evidence_and_one_says_nothing() -> None:
    assert binary(0, 0, 10).upper > 0.2
    assert binary(0, 0, 1000).upper < 0.003
    assert binary(1, 0, 1).upper == 1
    found = non_inferiority([0.5], [0.5], higher_is_better=True, margin=0.1)
    assert math.isinf(found.upper) and found.needed is None


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="cannot be paired"):
        non_inferiority([1.0], [1.0, 0.0], higher_is_better=True, margin=0.1)
    with pytest.raises(ValueError, match="expected a margin above 0"):
        non_inferiority([1.0], [1.0], higher_is_better=True, margin=0.0)
