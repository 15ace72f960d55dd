"""Gates that ask for evidence: `not_worse_than`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from evaluators.measurement import Measurement
from pytest_lmcompose.gate.judge import Reference, judge
from pytest_lmcompose.gate.possible import check_metrics
from pytest_lmcompose.gate.thresholds import Rule, ThresholdError, read_expression, read_rules
from pytest_lmcompose.results import Gate, encode
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings


def rules(tmp_path: Path, bound: str, metric: str = "recall") -> tuple[Rule, ...]:
    path = tmp_path / "thresholds.yaml"
    path.write_text(f"'*': {{{metric}: {{not_worse_than: {bound}}}}}")
    return read_rules(path)


def only(rules: Sequence[Rule], new: Measurement, old: Measurement) -> Gate:
    (gate,) = judge(rules, "memit", [new], {"base": Reference("the base model", [old], [[old]])})
    return gate


def answers(right: int, n: int, metric: str = "recall") -> Measurement:
    return Measurement.mean(metric, [1.0] * right + [0.0] * (n - right))


def perplexity(logs: list[float]) -> Measurement:
    mean = sum(logs) / len(logs)
    return Measurement("perplexity", math.exp(mean), 0.1, len(logs), False, tuple(logs))


def test_it_passes_on_evidence_and_fails_without(tmp_path: Path) -> None:
    gate = only(rules(tmp_path, "0.02"), answers(450, 500), answers(451, 500))
    assert gate.passed and gate.evidence is not None
    assert (gate.gate, gate.threshold, gate.base_value) == ("not_worse_than", 0.02, 0.902)
    assert gate.message == (
        "memit  recall = 0.9 is not worse than 0.902 of the base model by 0.02 (loss 0.002, with 0.95 confidence below "
        f"{gate.evidence.upper:.6g}; exact McNemar, n = 500)"
    )
    few = only(rules(tmp_path, "0.02"), answers(45, 50), answers(45, 50))
    assert not few.passed and few.evidence is not None and few.evidence.needed == 149
    assert "too little evidence; a model without any loss needs about 149 samples" in few.message
    assert only(rules(tmp_path, "0.02"), answers(120, 149), answers(120, 149)).passed
    lost = only(rules(tmp_path, "{margin: 0.02, level: 0.01}"), answers(400, 500), answers(450, 500))
    assert not lost.passed and "is worse than 0.9 of the base model by 0.02 or more" in lost.message


def test_a_margin_in_percent_is_one_of_the_reference(tmp_path: Path) -> None:
    gate = only(rules(tmp_path, "5%"), answers(400, 500), answers(400, 500))
    assert gate.threshold == pytest.approx(0.04) and gate.passed
    logs = [2.0 + 0.1 * (i % 3) for i in range(60)]
    same, worse = perplexity(logs), perplexity([x + 0.03 + 0.001 * (i % 2) for i, x in enumerate(logs)])
    for bound, passed in (("4%", True), ("3%", False)):  # 0.0305 nats are 3.1 %
        gate = only(rules(tmp_path, bound, "perplexity"), worse, same)
        assert gate.passed == passed and gate.evidence is not None and gate.evidence.loss is not None
        assert gate.evidence.loss == pytest.approx(same.value * math.expm1(0.0305), rel=1e-6)
        assert gate.threshold == pytest.approx(float(bound[:-1]) / 100 * same.value)


def test_what_is_read_and_not_sampled_needs_no_evidence(tmp_path: Path) -> None:
    old, new = (Measurement("average_bits", bits, 0.0, 1, False, (bits,)) for bits in (4.0, 4.1))
    assert only(rules(tmp_path, "0.2", "average_bits"), new, old).passed
    assert not only(rules(tmp_path, "0.05", "average_bits"), new, old).passed
    assert only(rules(tmp_path, "3%", "average_bits"), new, old).passed


def test_samples_that_cannot_be_paired_fail(tmp_path: Path) -> None:
    gate = only(rules(tmp_path, "0.02"), answers(90, 100), answers(45, 50))
    assert (
        not gate.passed and "not_worse_than cannot be judged: 50 samples of the base model against 100" in gate.message
    )


def test_the_record_survives_a_report(tmp_path: Path) -> None:
    gate = only(rules(tmp_path, "0.02"), answers(450, 500), answers(451, 500))
    assert msgspec.json.decode(encode(gate), type=Gate) == gate


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("0", "expected a margin above 0"),
        ("-1", "expected a margin above 0"),
        ("3se", "the limit is 'n3se', expected a loss"),
        ("{margin: 0.1, level: 1}", "the level is 1, expected one between 0 and 1"),
        ("{value: 0.1}", "expected the keys margin and level and of"),
        ("{margin: 0.1, level: yes}", "the level is True"),
    ],
)
def test_bad_bounds_are_refused(tmp_path: Path, bound: str, message: str) -> None:
    with pytest.raises(ThresholdError, match=message):
        rules(tmp_path, bound)


def test_a_margin_that_no_value_exceeds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ThresholdError, match="can never fail"):
        check_metrics(rules(tmp_path, "1"), tmp_path, WorldSettings(), EvaluateSettings(), tmp_path)


@pytest.mark.parametrize(
    ("text", "kind", "value"), [("a:n0.02", "not_worse_than", 0.02), ("a:n5%", "not_worse_than_percent", 5)]
)
def test_expressions(text: str, kind: str, value: float) -> None:
    (bound,) = read_expression(text).bounds
    assert (bound.kind, bound.value, bound.of, bound.level) == (kind, value, "baseline", 0.05)
    with pytest.raises(ThresholdError, match="expected a margin above 0"):
        read_expression("a:n0")


def test_rounding_fails_no_gate_of_samples(tmp_path: Path) -> None:
    """Another number of threads moves every sample by a millionth, all in the same direction."""
    logs = [2.0 + 0.01 * (i % 30) for i in range(200)]
    old = [Measurement.mean("recall", [x / 3 for x in logs]), perplexity(logs)]
    new = [Measurement.mean("recall", [x / 3 - 1e-6 for x in logs]), perplexity([x + 1e-6 for x in logs])]
    path = tmp_path / "thresholds.yaml"
    path.write_text("'*': {'*': {no_drop_p: 0.3, max_loss: 3se, not_worse_than: 0.05}}")
    gates = judge(read_rules(path), "memit", new, {"base": Reference("the base model", old, [old])})
    assert len(gates) == 6 and all(gate.passed for gate in gates), [gate.message for gate in gates]
