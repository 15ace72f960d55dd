"""Pools: one decision over the samples of several metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy import stats

from evaluators.measurement import Measurement
from pytest_lmcompose.gate import paired
from pytest_lmcompose.gate.judge import Reference, count_paired, judge, settle
from pytest_lmcompose.gate.pools import pooled, pools
from pytest_lmcompose.gate.thresholds import Rule, ThresholdError, read_expression, read_rules
from pytest_lmcompose.logs.judge import judge_logs
from pytest_lmcompose.logs.log import Log, Metric
from pytest_lmcompose.report.sections import evidence_rows, paired_rows
from pytest_lmcompose.results import CompositionResult, Gate, encode


def rules(tmp_path: Path, metric: str, bound: str) -> tuple[Rule, ...]:
    path = tmp_path / "thresholds.yaml"
    path.write_text(f"'*': {{'{metric}': {{{bound}}}}}")
    return read_rules(path)


POOLED = "no_drop_p: {value: 0.05, pool: true}"


def judged(found: tuple[Rule, ...], new: Sequence[Measurement], old: Sequence[Measurement]) -> tuple[Gate, ...]:
    return judge(found, "awq", new, {"base": Reference("the base model", old, [old])})


def task(name: str, right: int, n: int = 50, *, better: bool = True) -> Measurement:
    return Measurement.mean(f"accuracy/{name}", [1.0] * right + [0.0] * (n - right), higher_is_better=better)


def test_one_decision_is_made_over_all_tasks(tmp_path: Path) -> None:
    """Two answers lost in each of six tasks: no task shows it, all together do."""
    names = "abcdef"
    old, new = [task(name, 40) for name in names], [task(name, 38) for name in names]
    found = rules(tmp_path, "accuracy/*", POOLED)
    (gate,) = judged(found, new, old)
    assert gate.paired is not None and not gate.passed
    assert (gate.metric, gate.paired.test, gate.paired.n, gate.paired.p) == ("accuracy/*", "exact McNemar", 300, 2**-12)
    assert gate.message.startswith("awq  accuracy/* over 6 metrics = 0.76 is worse than 0.8 of the base model")
    assert gate.message.endswith("; no metric is worse by itself")
    assert gate.metrics == tuple(f"accuracy/{name}" for name in names)
    assert [count_paired(found, name, new) for name in ("awq", "base")] == [1, 0]
    alone = judged(rules(tmp_path, "accuracy/*", "no_drop_p: 0.05"), new, old)
    assert len(alone) == 6 and all(gate.passed for gate in alone)


def test_tasks_are_tested_one_by_one_where_the_pool_fails(tmp_path: Path) -> None:
    old = [task("a", 40), task("b", 40), task("c", 40)]
    (gate,) = judged(rules(tmp_path, "accuracy/*", POOLED), [task("a", 25), task("b", 39), task("c", 40)], old)
    assert gate.metrics == ("accuracy/a",) and [member.n for member in gate.pool] == [50, 50, 50]
    assert gate.pool[0].p == 3 * 2**-15
    assert gate.message.endswith("; worse by themselves: accuracy/a (drop 0.3, p = 9.16e-05)")
    record = CompositionResult("awq", (), (), "measured", None, None, (), None, (), (gate,))
    assert record.failed_metrics == {"accuracy/a"}
    assert [row[0].text for row in paired_rows([record])[1:]] == [
        "awq  accuracy/* (3 metrics)",
        "  accuracy/a: p = 9.2e-05, 50 samples, drop 0.3",
    ]
    assert msgspec.json.decode(encode(gate), type=Gate) == gate
    settled = settle({"awq": (gate,), "x": (gate,)}, 9)["awq"][0]  # the verdict at the end of the run
    assert settled.message.endswith("accuracy/a (drop 0.3, p = 9.16e-05)")
    (same,) = judged(rules(tmp_path, "accuracy/*", POOLED), old, old)
    assert same.passed and same.message.endswith("samples)") and len(same.metrics) == 3


def test_evidence_can_be_pooled(tmp_path: Path) -> None:
    names = "abcdefgh"
    old = [task(name, 40) for name in names]
    bound = "not_worse_than: {margin: 0.02, pool: true}"
    (gate,) = judged(rules(tmp_path, "accuracy/*", bound), old, old)
    assert gate.passed and gate.evidence is not None and gate.evidence.n == 400
    assert "awq  accuracy/* over 8 metrics = 0.8 is not worse than" in gate.message
    record = CompositionResult("awq", (), (), "measured", None, None, (), None, (), (gate,))
    assert [cell.text for cell in evidence_rows([record])[1]][0::7] == ["awq  accuracy/* (8 metrics)", "149"]
    alone = judged(rules(tmp_path, "accuracy/*", "not_worse_than: 0.02"), old, old)
    assert not any(gate.passed for gate in alone)  # 50 samples are too few


def test_other_directions_and_units_are_pools_of_their_own(tmp_path: Path) -> None:
    logs = [2 + 0.1 * (i % 3) for i in range(30)]
    text = Measurement("perplexity", math.exp(math.fsum(logs) / 30), 0.1, 30, False, tuple(logs))
    measured = [task("a", 40), task("b", 40), task("x", 40, better=False), task("y", 40, better=False), text]
    found = rules(tmp_path, "*", POOLED)
    gates = judged(found, measured, measured)
    assert [(gate.metric, len(gate.pool)) for gate in gates] == [("*", 2), ("*", 2), ("perplexity", 0)]
    assert count_paired(found, "awq", measured) == 3


def test_metrics_with_the_same_samples_count_once(tmp_path: Path) -> None:
    whole = Measurement.mean("accuracy/all", [1.0] * 100, note="pooled over accuracy/a, accuracy/b")
    parts = [task("a", 50), task("b", 50), Measurement.mean("recall", [1.0] * 9), Measurement.mean("recall/r", [1.0])]
    (pool,) = pools(rules(tmp_path, "*", POOLED), [whole, *parts])
    assert pool.metrics == ("accuracy/a", "accuracy/b", "recall")


def test_metrics_of_the_same_edits_are_clusters(tmp_path: Path) -> None:
    edits = [1.0] * 30 + [0.0] * 10
    success = Measurement.mean("edit_success_exact", edits)
    twice = Measurement.mean("edit_paraphrase_exact", edits * 2, clusters=[*range(40)] * 2)
    facts = Measurement.mean("recall", edits)
    both = pooled("*", [success, twice, facts], lambda _: "")
    assert (both.n, len(set(both.clusters))) == (160, 80)
    logs = [Measurement.mean(name, edits) for name in ("t/acc", "t/f1", "u/acc")]
    assert len(set(pooled("*", logs, lambda name: name[0]).clusters)) == 80
    lost = [Measurement.mean(m.metric, [0.0, *m.samples[1:]]) for m in (success, facts)]
    (gate,) = judged(rules(tmp_path, "*", POOLED), lost, [success, facts])
    assert gate.paired is not None and gate.paired.clusters == 0 and gate.paired.p == 0.25


def test_a_weighted_metric_keeps_its_weights() -> None:
    uneven = Measurement.mean("edit_locality_exact", [1.0, 0.0, 0.0], clusters=[0, 1, 1], weights=[1, 0.5, 0.5])
    plain = Measurement.mean("edit_success_exact", [1.0, 1.0])
    both = pooled("*", [uneven, plain], lambda _: "")
    assert both.value == pytest.approx((3 * 0.5 + 2) / 5) and len(set(both.clusters)) == 2


def test_what_cannot_be_pooled_fails(tmp_path: Path) -> None:
    found = rules(tmp_path, "accuracy/*", POOLED)
    new = [task("a", 40), task("b", 40)]
    (gate,) = judged(found, new, new[:1])
    assert not gate.passed and "no_drop_p cannot be judged: the base model was measured in 0 of 1" in gate.message
    known = {"base": Reference("the base model", new, [new], unlike={"accuracy/b": "other questions"})}
    (gate,) = judge(found, "awq", new, known)
    assert not gate.passed and "by the base model: accuracy/b: other questions" in gate.message
    broken = Measurement("accuracy/b", math.nan, None, 50, True, (math.nan,) * 50)
    gates = judged(found, [task("a", 40), broken], new)
    assert [(gate.metric, gate.gate, gate.passed) for gate in gates] == [
        ("accuracy/b", "finite", False),
        ("accuracy/a", "no_drop_p", True),
    ]


def test_repeats_are_pooled_one_by_one(tmp_path: Path) -> None:
    old, new = [task("a", 40), task("b", 40)], [[task("a", 38), task("b", 39)], [task("a", 36), task("b", 39)]]
    mean = [Measurement.mean(f"accuracy/{name}", [value] * 50) for name, value in (("a", 0.74), ("b", 0.78))]
    known = {"base": Reference("the base model", old, [old, old])}
    (gate,) = judge(rules(tmp_path, "accuracy/*", POOLED), "awq", mean, known, runs=new)
    assert gate.paired is not None
    assert (gate.paired.n, gate.value, gate.paired.drop) == (100, pytest.approx(0.76), pytest.approx(0.04))


@pytest.mark.parametrize(
    ("text", "kind", "value"), [("a*:pool p0.01", "no_drop_p", 0.01), ("a*:pool n5%", "not_worse_than_percent", 5)]
)
def test_expressions(text: str, kind: str, value: float) -> None:
    (bound,) = read_expression(text).bounds
    assert (bound.kind, bound.value, bound.of, bound.pool) == (kind, value, "baseline", True)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("no_drop_p: {value: 0.05, pool: 1}", "pool is 1, expected true or false"),
        ("no_drop_p: {value: 0.05, effect: 0}", "the effect is 0, expected a loss above 0"),
        ("max_loss: {value: 0.05, pool: true}", "expected the keys value and of"),
    ],
)
def test_bad_bounds_are_refused(tmp_path: Path, bound: str, message: str) -> None:
    with pytest.raises(ThresholdError, match=message):
        rules(tmp_path, "recall", bound)
    with pytest.raises(ThresholdError, match="the limit is 'pool 5%'"):
        read_expression("a:pool 5%")


def test_the_stated_effect_gives_the_needed_samples(tmp_path: Path) -> None:
    found = rules(tmp_path, "accuracy/*", "no_drop_p: {value: 0.05, effect: 0.02}")
    (gate,) = judged(found, [task("a", 45)], [task("a", 45)])
    assert gate.paired is not None and gate.paired.needed is not None
    assert gate.message.endswith(f"; one of 0.02 needs about {gate.paired.needed} samples)")
    assert stats.binom.sf(4, gate.paired.needed, 0.02) == pytest.approx(0.82, abs=0.03)  # 5 losses are significant


def test_a_pool_finds_a_drop_that_forty_gates_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tasks of 200 questions: 2.4 % of the answers are lost, 1.6 % are won."""
    monkeypatch.setattr(paired, "_smallest_drop", lambda *_: None)  # not asked for, and slow
    rng = np.random.default_rng(0)
    together, apart = rules(tmp_path, "accuracy/*", POOLED), rules(tmp_path, "accuracy/*", "no_drop_p: 0.05")
    for _ in range(3):
        sides: list[list[Measurement]] = [[], []]
        for i in range(40):
            before = (rng.random(200) < 0.8).astype(float)
            u = rng.random(200)
            after = np.where(u < 0.03, 0.0, np.where(u > 0.92, 1.0, before))
            for side, samples in zip(sides, (before, after), strict=True):
                side.append(Measurement.mean(f"accuracy/t{i}", samples.tolist()))
        old, new = sides
        assert not judged(together, new, old)[0].passed
        assert all(gate.passed for gate in settle({"awq": judged(apart, new, old)}, 40)["awq"])


def test_tasks_of_a_log_are_independent_and_their_metrics_are_not() -> None:
    def log(path: str, lost: int) -> Log:
        metrics = {}
        for name in ("a/acc", "b/acc", "a/acc_norm"):
            ids = list(map(str, range(40)))
            metrics[name] = Metric(name, samples=ids, prompts=[""] * 40, values=[float(i >= lost) for i in range(40)])
        return Log(path, "Inspect", metrics)

    for expression, clusters, p in (("*/acc:pool p0.05", 0, 2**-6), ("*:pool p0.05", 80, None)):
        (gate,) = judge_logs(log("old", 0), log("new", 3), [read_expression(expression)]).gates
        assert gate.paired is not None and gate.paired.clusters == clusters
        assert p is None or (gate.paired.p == p and not gate.passed)
