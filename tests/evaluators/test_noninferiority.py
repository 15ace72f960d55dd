"""Non-inferiority: the bound, its level, its power, and the samples it asks for."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluators.bounded import chance, upper_bound
from evaluators.noninferiority import NonInferiority, non_inferiority
from evaluators.significance import Drops


def binary(losses: int, gains: int, n: int, margin: float = 0.05) -> NonInferiority:
    before = [1.0] * losses + [0.0] * gains + [1.0] * (n - losses - gains)
    after = [0.0] * losses + [1.0] * gains + [1.0] * (n - losses - gains)
    return non_inferiority(Drops(before, after, higher_is_better=True), margin)


@cache
def below(losses: int, gains: int, n: int, margin: float = 0.05) -> bool:
    """Return whether the upper bound at 0.05 lies below the margin."""
    lost = np.repeat([1.0, -1.0, 0.0], [losses, gains, n - losses - gains])
    return chance(-lost, np.ones(n), 1.0, -margin) <= 0.05


@pytest.mark.parametrize("churn", [0.0, 0.02, 0.1])
def test_the_level_holds_and_the_count_of_samples_gives_the_power(churn: float) -> None:
    generator = np.random.default_rng(0)
    margin = 0.05
    lost = generator.multinomial(200, [margin + churn / 2, churn / 2, 1 - margin - churn], size=10_000)
    assert np.mean([below(int(b), int(c), 200) for b, c, _ in lost]) <= 0.05
    needed = binary(round(500 * churn), round(500 * churn), 1000, margin).needed
    assert needed is not None
    even = generator.multinomial(needed, [churn / 2, churn / 2, 1 - churn], size=4_000)
    power = np.mean([below(int(b), int(c), needed) for b, c, _ in even])
    assert power >= 0.76


def test_rare_large_losses_do_not_pass() -> None:
    """A gain of 0.01 in most samples, and rare losses that a sample may not have: a mean loss of the margin."""
    generator = np.random.default_rng(1)
    lost = np.where(generator.random((1_000, 50)) < 0.04, 0.99, -0.01)
    passed = [chance(-x, np.ones(50), 1.0, -(0.04 - 0.01)) <= 0.05 for x in lost]
    assert np.mean(passed) <= 0.05
    bounds = [upper_bound(x, np.ones(50), 1.0, 0.05) for x in lost[:100]]
    assert [bound < 0.03 for bound in bounds] == passed[:100]


def test_right_or_wrong_answers_without_gains_take_the_exact_bound_of_a_share() -> None:
    for losses, n in ((0, 10), (3, 50), (10, 10)):
        exact = stats.beta.ppf(0.95, losses + 1, n - losses) if losses < n else 1.0
        assert binary(losses, 0, n).upper == pytest.approx(float(exact), rel=1e-5)


def test_samples_without_a_range_take_the_bound_of_the_t_distribution() -> None:
    noise = np.random.default_rng(1).normal(size=15)
    before, after = np.concatenate([noise, -noise]), np.full(30, 0.05)  # no skewness
    for better, drops in ((True, before - after), (False, after - before)):
        found = non_inferiority(Drops(before, after, higher_is_better=better), 0.1, 0.1)
        upper = stats.ttest_1samp(drops, 0, alternative="less").confidence_interval(0.9).high
        assert found.upper == pytest.approx(upper, rel=1e-9)
    grouped = Drops(
        np.repeat(before, 3), np.repeat(after, 3), higher_is_better=True, clusters=[i // 3 for i in range(90)]
    )
    assert len(grouped.sums) == 30
    alone = non_inferiority(Drops(before, after, higher_is_better=True), 0.1)
    assert non_inferiority(grouped, 0.1).upper == pytest.approx(alone.upper, rel=1e-9)
    losses = np.random.default_rng(2).exponential(size=30)  # a few large ones: the bound must be higher
    skewed = non_inferiority(Drops(losses, np.zeros(30), higher_is_better=True), 0.1)
    assert skewed.upper > 1.02 * stats.ttest_1samp(losses, 0, alternative="less").confidence_interval(0.95).high


def test_the_t_tests_count_of_samples_gives_the_power() -> None:
    generator = np.random.default_rng(2)
    needed = non_inferiority(Drops(np.zeros(400), generator.normal(size=400), higher_is_better=True), 0.3).needed
    assert needed is not None
    draws = generator.normal(size=(3_000, needed))
    drops = draws.mean(axis=1) + stats.t.isf(0.05, needed - 1) * draws.std(axis=1, ddof=1) / math.sqrt(needed)
    assert np.mean(drops < 0.3) == pytest.approx(0.8, abs=0.05)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 40))
def test_the_bound_grows_with_losses_and_lies_above_the_loss(losses: int, gains: int, same: int) -> None:
    n = losses + gains + same + 1
    here, more = binary(losses, gains, n).upper, binary(losses + 1, gains, n).upper
    assert (losses - gains) / n <= here <= 1
    assert here <= more + 1e-6


def test_few_samples_are_no_evidence_and_one_says_nothing() -> None:
    assert binary(0, 0, 10).upper > 0.2
    assert binary(0, 0, 1000).upper < 0.004
    assert binary(1, 0, 1).upper == 1
    found = non_inferiority(Drops([0.5], [0.5], higher_is_better=True), 0.1)
    assert math.isinf(found.upper) and found.needed is None


def test_a_margin_below_0_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a margin above 0"):
        non_inferiority(Drops([1.0], [1.0], higher_is_better=True), 0.0)
