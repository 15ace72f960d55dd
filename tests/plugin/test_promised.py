"""Gates on what steps promise: bits and zeros by their settings, edits, removed knowledge; known losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from evaluators.measurement import Measurement
from pytest_lmcompose.composition import parse
from pytest_lmcompose.gate.judge import Reference, judge
from pytest_lmcompose.gate.promises import promises
from pytest_lmcompose.gate.thresholds import ThresholdError, compares_with, read_rules
from pytest_lmcompose.options import read_options
from pytest_lmcompose.recipe import load_recipe
from pytest_lmcompose.results import Gate
from pytest_lmcompose.run import CONF, Run

ROOT = Path(__file__).parents[2]
PROMISED = """
"*":
  average_bits: {promised: 0.01}
  sparsity: {promised: 0.01}
  accuracy/hazardous: {promised: 0.4}
  edit_success_exact: {promised: 0.9}
"""


def verdicts(tmp_path: Path, composition: str, metric: str, value: float, rules: str = PROMISED) -> list[Gate]:
    (tmp_path / "thresholds.yaml").write_text(rules)
    better = metric not in ("average_bits", "accuracy/hazardous")
    measured = [Measurement(metric, value, 0.0, 1, better, (value,))]
    promised = tuple(promises(load_recipe(CONF), parse(composition)))
    found = judge(read_rules(tmp_path / "thresholds.yaml"), composition, measured, {}, promises=promised)
    return [verdict for verdict in found if verdict.metric == metric and verdict.gate != "measured"]


@pytest.mark.parametrize(
    ("composition", "metric", "value", "passed"),
    [
        ("awq", "average_bits", 4.0, True),
        ("awq", "average_bits", 4.2, False),
        ("awq[bits=3]", "average_bits", 4.0, False),
        ("awq[bits=3]", "average_bits", 3.0, True),
        ("memit+gptq[bits=8]", "average_bits", 8.0, True),
        ("gptq[bits=8]+awq", "average_bits", 4.0, True),
        ("awq+gptq[bits=8]", "average_bits", 8.0, False),
        ("awq+memit", "average_bits", 6.8, False),
        ("awq+memit+awq", "average_bits", 4.0, True),
        ("wanda", "sparsity", 0.4998, True),
        ("wanda[sparsity=0.65]", "sparsity", 0.5, False),
        ("sparsegpt[sparsity=0.75]+memit", "sparsity", 0.6, False),
        ("rmu", "accuracy/hazardous", 0.38, True),
        ("rmu+awq", "accuracy/hazardous", 0.7, False),
        ("rmu+relearn", "accuracy/hazardous", 0.7, False),
        ("memit+gd", "edit_success_exact", 0.05, False),
        ("lora", "edit_success_exact", 1.0, True),
    ],
)
def test_a_promise_follows_the_settings_of_the_steps_in_any_order(
    tmp_path: Path, composition: str, metric: str, value: float, passed: bool
) -> None:
    (verdict,) = verdicts(tmp_path, composition, metric, value)
    assert verdict.passed is passed and verdict.gate == "promised"
    assert "promised by" in verdict.message


@pytest.mark.parametrize(
    ("composition", "metric"),
    [
        ("base", "average_bits"),
        ("memit", "average_bits"),
        ("awq", "sparsity"),
        ("awq", "edit_success_exact"),
        ("memit+awq", "accuracy/hazardous"),
        ("relearn", "accuracy/hazardous"),
    ],
)
def test_what_no_step_promises_is_not_judged(tmp_path: Path, composition: str, metric: str) -> None:
    assert verdicts(tmp_path, composition, metric, 0.5) == []


def test_a_broken_promise_names_the_step_that_broke_it_and_the_fix(tmp_path: Path) -> None:
    (verdict,) = verdicts(tmp_path, "awq+memit", "average_bits", 6.8)
    assert "= 6.8 > 4.04, promised by awq and broken by memit: use awq+memit+awq" in verdict.message


LOST = '"awq+memit": {average_bits: {lost: memit rewrites what awq quantised}}'


def test_a_known_loss_passes_while_it_is_one(tmp_path: Path) -> None:
    (lost,) = verdicts(tmp_path, "awq+memit", "average_bits", 6.8, LOST)
    assert lost.passed and lost.gate == "lost" and lost.threshold is None
    assert "is a known loss: memit rewrites what awq quantised" in lost.message
    (kept,) = verdicts(tmp_path, "awq+memit", "average_bits", 4.0, LOST)
    assert not kept.passed and "remove the rule" in kept.message
    (other,) = verdicts(tmp_path, "memit", "average_bits", 6.8, LOST.replace("awq+memit", "memit"))
    assert not other.passed and "no step promises anything about it" in other.message


@pytest.mark.parametrize(
    "rule",
    [
        "average_bits: {promised: true}",
        "average_bits: {promised: -0.1}",
        "average_bits: {promised: .nan}",
        "average_bits: {promised: {value: 0.1, of: base}}",
        "perplexity: {promised: 2}",
        "'*': {promised: 2}",
        "average_bits: {lost: true}",
        "average_bits: {lost: ''}",
        "perplexity: {lost: because}",
    ],
)
def test_rules_that_could_not_be_judged_are_refused(tmp_path: Path, rule: str) -> None:
    (tmp_path / "thresholds.yaml").write_text(f"'*': {{{rule}}}")
    with pytest.raises(ThresholdError, match=r"average_bits|perplexity|promises anything"):
        read_rules(tmp_path / "thresholds.yaml")


def test_losses_that_the_suite_accepts_are_accepted_for_its_own_model_alone(
    tiny_model: Path, pytestconfig: pytest.Config
) -> None:
    options = read_options(pytestconfig)

    def judged(model: str | None) -> list[str]:
        rules = Run(dataclasses.replace(options, model=model, world="tinyworld"), print).rules
        return [bound.kind for rule in rules if rule.composition == "awq+memit" for bound in rule.bounds]

    assert judged(None) == ["lost"] and judged(str(tiny_model)) == []


@pytest.mark.parametrize(
    ("composition", "value", "passed"),
    [
        ("wanda[pattern='2:4']", 1.0, True),
        ("wanda[pattern='2:4']+awq", 1.0, True),
        ("wanda[pattern='2:4']+memit", 0.7, False),
    ],
)
@pytest.mark.parametrize("file", ["tinyworld.yaml", "relative.yaml"])
def test_a_pattern_that_a_later_step_loses_fails_by_the_default_thresholds(
    tmp_path: Path, composition: str, value: float, passed: bool, file: str
) -> None:
    default = (CONF / "thresholds" / file).read_text()
    (verdict,) = verdicts(tmp_path, composition, "sparsity_2_4", value, default)
    assert verdict.passed is passed and "promised by wanda" in verdict.message
    assert ("and broken by memit" in verdict.message) is not passed


def test_a_known_loss_names_its_fix_once(tmp_path: Path) -> None:
    rule = '"awq+memit": {average_bits: {lost: use awq+memit+awq to ship both}}'
    (verdict,) = verdicts(tmp_path, "awq+memit", "average_bits", 6.8, rule)
    assert verdict.message.count("awq+memit+awq") == 1


RELATIVE = "'*': {accuracy/hazardous: {promised: {max_ratio_of_base: 0.8}}}"


@pytest.mark.parametrize(
    ("composition", "value", "passed"),
    [("rmu", 0.4, True), ("rmu", 0.41, False), ("rmu+awq", 0.3, True), ("memit+awq", 0.5, None), ("base", 0.5, None)],
)
def test_a_promise_may_be_relative_to_the_base_model(
    tmp_path: Path, composition: str, value: float, passed: bool | None
) -> None:
    """Only compositions that unlearn have the gate; then hazardous accuracy must fall by a fifth."""
    (tmp_path / "thresholds.yaml").write_text(RELATIVE)
    rules = read_rules(tmp_path / "thresholds.yaml")
    base = Reference("the base model", [Measurement("accuracy/hazardous", 0.5, 0.0, 1, False, (0.5,))])
    measured = [Measurement("accuracy/hazardous", value, 0.0, 1, False, (value,))]
    promised = tuple(promises(load_recipe(CONF), parse(composition)))
    found = judge(rules, composition, measured, {"base": base}, promises=promised)
    assert [gate.passed for gate in found] == ([] if passed is None else [passed])
    assert all("max_ratio_of_base 0.8 of 0.5 = 0.4, promised by rmu" in gate.message for gate in found)
    assert compares_with(rules, parse("rmu")) == (parse("base"),)


def test_a_relative_promise_names_what_broke_it(tmp_path: Path) -> None:
    (tmp_path / "thresholds.yaml").write_text(RELATIVE)
    base = Reference("the base model", [Measurement("accuracy/hazardous", 0.5, 0.0, 1, False, (0.5,))])
    measured = [Measurement("accuracy/hazardous", 0.45, 0.0, 1, False, (0.45,))]
    promised = tuple(promises(load_recipe(CONF), parse("rmu+relearn")))
    (gate,) = judge(
        read_rules(tmp_path / "thresholds.yaml"), "rmu+relearn", measured, {"base": base}, promises=promised
    )
    assert "promised by rmu and broken by relearn" in gate.message


@pytest.mark.parametrize(
    "bounds", ["{}", "{no_drop_p: 0.05}", "{lost: why}", "{promised: 0.4}", "{most: 0.4}", "{max_ratio_of_base: 0}"]
)
def test_relative_promises_that_cannot_be_judged_are_refused(tmp_path: Path, bounds: str) -> None:
    (tmp_path / "thresholds.yaml").write_text(f"'*': {{accuracy/hazardous: {{promised: {bounds}}}}}")
    with pytest.raises(ThresholdError, match="accuracy/hazardous"):
        read_rules(tmp_path / "thresholds.yaml")


@pytest.mark.parametrize(
    ("composition", "metric", "value", "passed"),
    [
        ("sft", "tuning_recall/guilds", 0.95, True),
        ("sft+awq[bits=2]", "tuning_recall/guilds", 0.4, False),
        ("sft[sets=[harbours]]", "tuning_recall/harbours", 0.4, False),
        ("sft[sets=[harbours]]", "tuning_recall/guilds", 0.0, None),
        ("dpo", "tuning_recall/guilds", 0.0, None),
        ("dpo", "preference_wins", 0.5, False),
        ("sft", "preference_wins", 0.5, None),
        ("memit+sft", "edit_success_exact", 0.5, False),
        ("rmu+sft", "accuracy/hazardous", 0.7, False),
    ],
)
def test_tuning_promises_what_it_trains_on_and_undoes_no_other_promise(
    tmp_path: Path, composition: str, metric: str, value: float, passed: bool | None
) -> None:
    rules = PROMISED + "  tuning_recall/*: {promised: 0.9}\n  preference_wins: {promised: 0.9}\n"
    found = verdicts(tmp_path, composition, metric, value, rules)
    assert [verdict.passed for verdict in found] == ([] if passed is None else [passed])
