"""Thresholds and verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evaluators.measurement import Measurement
from pytest_lmcompose.gate import Rule, ThresholdError, Verdict, judge, needs_base, read_rules
from pytest_lmcompose.options import SUITE_FOLDER


def measured(metric: str, value: float, stderr: float | None = 0.1) -> Measurement:
    return Measurement(metric, value, stderr, 20, True, (value,) * 20)


def rules(tmp_path: Path, text: str) -> tuple[Rule, ...]:
    path = tmp_path / "thresholds.yaml"
    path.write_text(text)
    return read_rules(path)


def only(verdicts: tuple[Verdict, ...]) -> Verdict:
    (verdict,) = verdicts
    return verdict


def test_the_suites_own_thresholds_are_readable() -> None:
    assert needs_base(read_rules(SUITE_FOLDER / "thresholds.yaml"), "memit+awq")


def test_a_failure_names_metric_value_threshold_n_and_error(tmp_path: Path) -> None:
    found = only(judge(rules(tmp_path, "'*': {recall: {min: 0.9}}"), "memit", [measured("recall", 0.85)]))
    assert not found.passed
    assert found.message == "memit  recall = 0.85 < min 0.9 (n = 20, standard error 0.1)"


@pytest.mark.parametrize(
    ("bound", "value", "passed"),
    [
        ("min: 0.5", 0.5, True),
        ("min: 0.5", math.nextafter(0.5, 0), False),
        ("max: 0.5", 0.5, True),
        ("max: 0.5", math.nextafter(0.5, 1), False),
        ("min_ratio_of_base: 0.5", 0.4, True),
        ("min_ratio_of_base: 0.5", 0.39, False),
        ("max_ratio_of_base: 0.5", 0.41, False),
    ],
)
def test_values_are_compared_unrounded(tmp_path: Path, bound: str, value: float, passed: bool) -> None:
    found = judge(rules(tmp_path, f"'*': {{m: {{{bound}}}}}"), "x", [measured("m", value)], [measured("m", 0.8)])
    assert only(found).passed is passed


def test_a_failure_by_a_hair_shows_the_full_numbers(tmp_path: Path) -> None:
    value = math.nextafter(0.5, 0)
    found = only(judge(rules(tmp_path, "'*': {m: {min: 0.5}}"), "x", [measured("m", value)]))
    assert repr(value) in found.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails_even_without_a_rule(value: float) -> None:
    found = only(judge((), "x", [measured("m", value)]))
    assert (found.gate, found.passed) == ("finite", False)


def test_nan_fails_its_threshold(tmp_path: Path) -> None:
    assert not only(judge(rules(tmp_path, "'*': {m: {max: 1}}"), "x", [measured("m", math.nan)])).passed


@pytest.mark.parametrize("glob", ["absent", "abs*"])
def test_a_threshold_without_a_measurement_fails(tmp_path: Path, glob: str) -> None:
    verdicts = judge(rules(tmp_path, f"'*': {{'{glob}': {{max: 1}}}}"), "x", [measured("m", 0.0)])
    assert only(verdicts).gate == "measured"
    assert not only(verdicts).passed


@pytest.mark.parametrize("base", [[], [measured("m", 0.0)], [measured("m", math.nan)]])
def test_a_ratio_without_a_usable_base_fails(tmp_path: Path, base: list[Measurement]) -> None:
    found = only(judge(rules(tmp_path, "'*': {m: {min_ratio_of_base: 0.1}}"), "x", [measured("m", 1.0)], base))
    assert not found.passed
    assert "base model's value" in found.message


@pytest.mark.parametrize(
    ("composition", "metric", "threshold"),
    [
        ("awq", "recall", 0.1),
        ("awq", "recall/born", 0.2),
        ("memit", "recall", 0.3),
        ("memit+awq", "recall", 0.4),
        ("memit+awq", "recall/born", 0.5),
        ("awq[bits=3]", "recall", 0.6),
    ],
)
def test_the_most_specific_rule_holds(tmp_path: Path, composition: str, metric: str, threshold: float) -> None:
    text = """
"memit+awq": {"recall*": {min: 0.5}, recall: {min: 0.4}}
"awq[bits=3]": {"*": {min: 0.6}}
"*": {"*": {min: 0.1}, "recall/*": {min: 0.2}}
"memit*": {"*": {min: 0.3}}
"""
    verdicts = judge(rules(tmp_path, text), composition, [measured(metric, 1.0)])
    assert [v.threshold for v in verdicts if v.gate == "min"] == [threshold]


def test_an_empty_rule_lifts_a_gate(tmp_path: Path) -> None:
    text = "'*': {m: {min: 1}}\nmemit: {m: {}}"
    assert judge(rules(tmp_path, text), "memit", [measured("m", 0.0)]) == ()
    assert judge(rules(tmp_path, text), "memit", []) == ()
    assert not only(judge(rules(tmp_path, text), "awq", [measured("m", 0.0)])).passed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping"),
        ("'*': {m: 3}", "expected a mapping"),
        ("'*': {m: {minimum: 3}}", "unknown bound 'minimum'"),
        ("'*': {m: {min: high}}", "expected a number"),
        ("'*': {m: {min: .nan}}", "expected a number"),
        ("'*': {m: {min: 1}}\n'*': {k: {min: 1}}", "stands twice"),
        ("'*': {m: {min: 1}", "thresholds.yaml"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ThresholdError, match=message) as error:
        rules(tmp_path, text)
    assert "thresholds.yaml" in str(error.value)
