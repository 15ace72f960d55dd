"""Order-free error, order sensitivity, their intervals, and interference."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.composability import (
    Interval,
    best_order,
    bootstrap_orders,
    interference,
    order_free_error,
    order_sensitivity,
)
from evaluators.measurement import EvaluationError

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "paper_llama3_edit_compress.json").read_text())
AB, BA = ("a", "b"), ("b", "a")
shares = st.floats(0, 1)


def paper_values(pair: list[str], strength: dict[str, float], metric: str) -> dict[tuple[str, ...], float]:
    rows = [r for r in PAPER["raw_rows"] if r["bits_or_sparsity"] == strength]
    values = {
        tuple(r["interventions"]): r["metrics"][metric] for r in rows if sorted(r["interventions"]) == sorted(pair)
    }
    assert len(values) == 2
    return values


def test_every_cell_of_the_papers_table_is_reproduced() -> None:
    """The raw rows have two decimals, the cells four."""
    cells = 0
    for row in PAPER["composability_4dp"]:
        for metric, cell in row["metrics"].items():
            values = paper_values(row["interventions"], row["bits_or_sparsity"], metric)
            higher = metric != "avg_wmdp"
            assert order_free_error(values, higher_is_better=higher) == pytest.approx(
                cell["order_free_error"], abs=0.005
            )
            assert order_sensitivity(values) == pytest.approx(cell["order_sensitivity"], abs=0.010)
            cells += 2
    assert cells == 120


def test_every_printed_cell_is_reproduced() -> None:
    """As printed: two decimals, cut or rounded, from numbers that had more."""
    found = {"order_free_error_2dp": 0, "order_sensitivity_2dp": 0}
    for table in PAPER["published_2dp"]:
        for row in table["rows"]:
            for metric, cell in row["metrics"].items():
                values = paper_values(row["interventions"], row["bits_or_sparsity"], metric)
                for name, text in cell.items():
                    if name == "order_free_error_2dp":
                        assert order_free_error(values, higher_is_better=True) == pytest.approx(float(text), abs=0.0101)
                    else:
                        assert order_sensitivity(values) == pytest.approx(float(text), abs=0.0151)
                    found[name] += 1
    assert found == {"order_free_error_2dp": 48, "order_sensitivity_2dp": 48}


def test_by_hand() -> None:
    values = {AB: 0.7, BA: 0.9}
    assert order_free_error(values, higher_is_better=True) == pytest.approx(0.1)
    assert order_free_error(values, higher_is_better=False) == 0.7
    assert order_sensitivity(values) == pytest.approx(0.2)
    assert best_order(values, higher_is_better=True) == BA
    assert best_order(values, higher_is_better=False) == AB


def test_runs_are_averaged_before_orders_are_compared() -> None:
    values = {AB: [0.9, 0.5], BA: [0.5, 0.9, 0.7]}
    assert order_sensitivity(values) == pytest.approx(0)  # the sensitivities of single runs are 0.4
    assert order_free_error(values, higher_is_better=True) == pytest.approx(0.3)
    assert order_sensitivity({AB: np.array([0.2, 0.4]), BA: np.float32(0.5)}) == pytest.approx(0.2)


def test_three_steps_in_the_orders_that_there_are() -> None:
    values = {("a", "b", "c"): 0.5, ("c", "b", "a"): 0.8, ("b", "a", "c"): 0.6}
    assert order_free_error(values, higher_is_better=True) == pytest.approx(0.2)
    assert order_sensitivity(values) == pytest.approx(0.3)


@given(st.lists(shares, min_size=6, max_size=6))
def test_the_largest_gap_is_the_largest_of_all_pairs(values: list[float]) -> None:
    table = dict(zip(itertools.permutations("abc"), values, strict=True))
    gaps = [order_sensitivity({a: table[a], b: table[b]}) for a, b in itertools.combinations(table, 2)]
    assert order_sensitivity(table) == max(gaps)
    for higher in (True, False):
        errors = [
            order_free_error({a: table[a], b: table[b]}, higher_is_better=higher) for a, b in itertools.pairwise(table)
        ]
        assert order_free_error(table, higher_is_better=higher) == min(errors)


@given(shares, shares)
def test_direction_turns_with_the_metric(one: float, other: float) -> None:
    error = order_free_error({AB: one, BA: other}, higher_is_better=True)
    assert error == pytest.approx(order_free_error({AB: 1 - one, BA: 1 - other}, higher_is_better=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({AB: math.nan, BA: 0.5}, r"a\+b: a value is NaN"),
        ({AB: [0.5, math.nan], BA: 0.5}, r"a\+b: a value is NaN"),
        ({AB: [], BA: 0.5}, r"a\+b: no value"),
        ({AB: [math.inf, -math.inf], BA: 0.5}, r"a\+b: its repeats are infinite"),
        ({}, "0 orders of the steps"),
        ({AB: 0.5}, "1 order of the steps"),
        ({AB: 0.5, ("b", "c"): 0.5}, r"b\+c and a\+b are not orders of the same steps"),
        ({AB: 0.5, ("b", "a", "a"): 0.5}, "not orders of the same steps"),
        ({"ab": 0.5, "ba": 0.5}, "'ab' is not an order"),
    ],
)
def test_what_cannot_be_compared_is_an_error(values: Any, message: str) -> None:
    for call in (order_sensitivity, lambda v: order_free_error(v, higher_is_better=True)):
        with pytest.raises(EvaluationError, match=message):
            call(values)


def test_infinite_perplexities() -> None:
    assert order_free_error({AB: math.inf, BA: 8.0}, higher_is_better=False) == 8.0
    assert order_sensitivity({AB: math.inf, BA: 8.0}) == math.inf
    assert math.isnan(order_sensitivity({AB: math.inf, BA: math.inf}))


def two_orders(rng: np.random.Generator, n: int, a: float, b: float, churn: float = 0.1) -> dict[Any, Any]:
    """Return 0/1 outcomes of both orders on the same questions: hard ones are hard in both."""
    hard = rng.random(n)
    return {AB: [(hard < a).astype(float)], BA: [(np.clip(hard + rng.normal(0, churn, n), 0, 1) < b).astype(float)]}


def test_the_value_is_that_of_the_plain_functions() -> None:
    samples = two_orders(np.random.default_rng(0), 50, 0.8, 0.6)
    means = {order: runs[0].mean() for order, runs in samples.items()}
    for higher in (True, False):
        found = bootstrap_orders(samples, higher_is_better=higher, generator=np.random.default_rng(1))
        assert found.order_free_error.value == pytest.approx(order_free_error(means, higher_is_better=higher))
        assert found.order_sensitivity.value == pytest.approx(order_sensitivity(means))
        assert found.best == best_order(means, higher_is_better=higher)
        for interval in (found.order_free_error, found.order_sensitivity):
            assert 0 <= interval.low < interval.value < interval.high <= 1


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    samples = {order: [rng.random(50), rng.random(50)] for order in (AB, BA)}
    one, two, other = (
        bootstrap_orders(samples, higher_is_better=True, generator=np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert one == two != other


def test_errors_turn_with_the_direction_and_the_interval_with_them() -> None:
    samples = two_orders(np.random.default_rng(0), 60, 0.8, 0.6)
    turned = {order: [1 - run for run in runs] for order, runs in samples.items()}
    one = bootstrap_orders(samples, higher_is_better=True, generator=np.random.default_rng(1))
    two = bootstrap_orders(turned, higher_is_better=False, generator=np.random.default_rng(1))
    assert two.order_free_error == pytest.approx(one.order_free_error)
    assert two.order_sensitivity == pytest.approx(one.order_sensitivity)


def test_pairing_takes_out_what_is_hard_in_every_order() -> None:
    rng = np.random.default_rng(5)
    x = rng.random(200)
    paired = bootstrap_orders({AB: [x], BA: [x - 0.02]}, higher_is_better=True, generator=np.random.default_rng(0))
    mixed = bootstrap_orders(
        {AB: [x], BA: [rng.permutation(x) - 0.02]}, higher_is_better=True, generator=np.random.default_rng(0)
    )
    assert paired.order_sensitivity == pytest.approx(Interval(0.02, 0.02, 0.02))
    assert mixed.order_sensitivity.low == 0 < 0.05 < mixed.order_sensitivity.high


@pytest.mark.parametrize(("a", "b"), [(0.85, 0.7), (0.8, 0.8)])
def test_intervals_cover_the_truth(a: float, b: float) -> None:
    """Also where both orders are equal, where a percentile interval of the gap never reaches 0."""
    rng = np.random.default_rng(6)
    covered = np.zeros(2)
    for _ in range(200):
        found = bootstrap_orders(
            two_orders(rng, 100, a, b, churn=0.0 if a != b else 0.1),
            higher_is_better=True,
            generator=rng,
            resamples=400,
        )
        # The churn moves answers across the edges of [0, 1] alike, so that b stays the share.
        error, gap = found.order_free_error, found.order_sensitivity
        covered += [error.low - 1e-9 <= 1 - max(a, b) <= error.high + 1e-9, gap.low - 1e-9 <= abs(a - b) <= gap.high]
    assert (covered / 200 >= 0.91).all(), covered / 200


def test_repeats_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(7)
    alike = {order: [rng.random(100) for _ in range(4)] for order in (AB, BA)}
    shift = [0.0, 0.4, 0.8, 1.2]
    apart = {AB: [run + s for run, s in zip(alike[AB], shift, strict=True)], BA: alike[BA]}
    narrow, wide = (
        bootstrap_orders(table, higher_is_better=False, generator=np.random.default_rng(0)).order_sensitivity
        for table in (alike, apart)
    )
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_questions_asked_in_every_repeat_are_no_new_questions() -> None:
    rng = np.random.default_rng(8)
    table = {order: rng.random(60) for order in (AB, BA)}
    once = bootstrap_orders({o: [x] for o, x in table.items()}, higher_is_better=True, generator=rng)
    same, other = (
        bootstrap_orders({o: [x] * 5 for o, x in table.items()}, higher_is_better=True, generator=rng, same_samples=s)
        for s in (True, False)
    )

    def width(found: Any) -> float:
        return float(found.order_free_error.high - found.order_free_error.low)

    assert width(same) == pytest.approx(width(once), rel=0.1)
    assert width(other) == pytest.approx(width(once) / math.sqrt(5), rel=0.15)


def test_clusters_are_drawn_whole() -> None:
    rng = np.random.default_rng(9)
    table = {order: rng.random(40) for order in (AB, BA)}
    once = bootstrap_orders(
        {o: [x] for o, x in table.items()}, higher_is_better=True, generator=np.random.default_rng(0)
    )
    copies = bootstrap_orders(
        {o: [np.repeat(x, 6)] for o, x in table.items()},
        higher_is_better=True,
        generator=np.random.default_rng(0),
        clusters=[[i // 6 for i in range(240)]],
    )
    assert copies.order_free_error == pytest.approx(once.order_free_error)
    assert copies.order_sensitivity == pytest.approx(once.order_sensitivity)


def test_perplexities_are_resampled_as_likelihoods() -> None:
    rng = np.random.default_rng(10)
    nll = {order: [rng.normal(2, 0.2, 80)] for order in (AB, BA)}
    found = bootstrap_orders(nll, higher_is_better=False, generator=rng, link="exp")
    values = {order: math.exp(runs[0].mean()) for order, runs in nll.items()}
    best = found.best
    assert found.order_free_error.value == pytest.approx(min(values.values())) == pytest.approx(values[best])
    assert found.order_sensitivity.value == pytest.approx(abs(values[AB] - values[BA]))
    deviation = values[best] * np.std(nll[best]) / math.sqrt(80)
    reach = found.order_free_error.high - values[best]
    assert 1.9 * deviation < reach < 2.7 * deviation  # two orders at once, hence more than 1.96


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ({AB: [[1.0, math.nan]], BA: [[1.0, 1.0]]}, {}, r"a\+b: some samples are NaN"),
        ({AB: [[1.0]], BA: [[1.0, 1.0]]}, {}, r"a\+b and b\+a cannot be paired"),
        ({AB: [[1.0], [1.0]], BA: [[1.0]]}, {}, "cannot be paired"),
        ({AB: [[]], BA: [[]]}, {}, "expected a list of samples for each repeat"),
        ({AB: [], BA: []}, {}, "expected a list of samples for each repeat"),
        ({AB: [[1.0]]}, {}, "1 order of the steps"),
        ({AB: [[1.0, 0.0]], BA: [[1.0, 1.0]]}, {"clusters": [["x"]]}, "1 clusters for 2 samples"),
        ({AB: [[1.0], [0.0, 1.0]], BA: [[1.0], [1.0, 1.0]]}, {"same_samples": True}, "different numbers of samples"),
    ],
)
def test_samples_that_cannot_be_resampled(samples: Any, options: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        bootstrap_orders(samples, higher_is_better=True, generator=np.random.default_rng(0), **options)


def test_interference_by_hand() -> None:
    after = [{"edit": 0.9, "ppl": 10.0}, None, {"edit": 0.6, "ppl": 12.0}]
    found = interference(("memit", "rmu", "awq"), after, ["edit", "ppl", "mmlu"])
    assert found.change[0] == pytest.approx((-0.3, 2.0, math.nan), nan_ok=True)
    assert all(map(math.isnan, found.change[1]))
    assert found.change[2] == pytest.approx((0, 0, math.nan), nan_ok=True)
    with pytest.raises(EvaluationError, match=r"a\+b: the end was not measured"):
        interference(AB, [{}, None], ["m"])
    with pytest.raises(EvaluationError, match="2 steps but 1 states"):
        interference(AB, [{}], ["m"])
