"""Thresholds and verdicts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from evaluators.measurement import Measurement
from pytest_lmcompose.gate import Rule, ThresholdError, Verdict, judge, needs_base, paired_gates, read_rules, settle
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
        ("'*': {m: {no_drop_p: 1}}", "expected a level of significance such as 0.05"),
        ("'*': {m: {no_drop_p: -0.1}}", "expected a level of significance such as 0.05"),
        ("'*': {m: {min: 1}}\n'*': {k: {min: 1}}", "stands twice"),
        ("'*': {m: {min: 1}", "thresholds.yaml"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ThresholdError, match=message) as error:
        rules(tmp_path, text)
    assert "thresholds.yaml" in str(error.value)


NO_DROP = "'*': {m: {no_drop_p: 0.05}}"


def answers(right: int, n: int = 100, *, better: bool = True, metric: str = "m") -> Measurement:
    samples = [1.0] * right + [0.0] * (n - right)
    return Measurement.mean(metric, samples if better else [1 - x for x in samples], higher_is_better=better)


@pytest.mark.parametrize("better", [True, False])
def test_a_paired_gate_says_what_it_found_and_could_have_found(tmp_path: Path, better: bool) -> None:
    base, worse, noise = (answers(n, better=better) for n in (90, 80, 89))
    found = only(judge(rules(tmp_path, NO_DROP), "memit", [worse], [base], gates=4))
    value, before = (0.8, 0.9) if better else (0.2, 0.1)
    assert found.paired is not None
    assert (found.passed, found.value, found.base_value) == (False, pytest.approx(value), pytest.approx(before))
    assert found.paired.p == 2**-10  # ten answers lost, none won
    assert settle({"memit": (found,)}, 4)["memit"][0].paired == replace(found.paired, p_holm=4 * 2**-10)
    # Seven losses and no gain are significant at 0.0125, and binom.sf(6, 100, 0.0894) is 0.8.
    assert found.message == (
        f"memit  m = {value:g} is worse than {before:g} of the base model at no_drop_p 0.05: p = 0.000977, after Holm "
        "over 4 gates 0.000977 (exact McNemar, n = 100, drop 0.1 with standard error 0.0302; "
        "finds drops from 0.0894 with 80% power at level 0.0125)"
    )
    passing = only(judge(rules(tmp_path, NO_DROP), "memit", [noise], [base]))
    assert passing.passed and " is not worse than " in passing.message
    assert only(judge(rules(tmp_path, NO_DROP), "memit", [base], [worse])).passed  # better than the base model


def test_prompts_of_one_edit_are_one_unit_of_a_paired_gate(tmp_path: Path) -> None:
    before, after = [1.0, 0.5, 1.0, 0.75, 1.0], [0.5, 0.5, 0.75, 0.5, 0.25]
    prompts = [i for i in range(5) for _ in range(4)]

    def copied(samples: list[float], clusters: list[int] | None = None) -> Measurement:
        return Measurement.mean("m", [samples[i] for i in prompts], clusters=clusters)

    def judged(old: Measurement, new: Measurement) -> Verdict:
        return only(judge(rules(tmp_path, NO_DROP), "x", [new], [old]))

    alone = judged(Measurement.mean("m", before), Measurement.mean("m", after)).paired
    grouped = judged(copied(before, prompts), copied(after, prompts))
    ungrouped = judged(copied(before), copied(after)).paired
    assert alone is not None and grouped.paired is not None and ungrouped is not None
    assert (grouped.paired.n, grouped.paired.clusters, alone.clusters) == (20, 5, 0)
    assert grouped.paired.p == pytest.approx(alone.p) and ungrouped.p < alone.p / 10
    assert grouped.paired.smallest_drop == pytest.approx(alone.smallest_drop)
    assert "n = 20 in 5 groups, drop 0.35" in grouped.message
    other = judged(copied(before, prompts), copied(after))
    assert not other.passed and "the samples are grouped differently for the base model" in other.message


def test_a_ratio_says_which_drop_it_could_tell_from_noise(tmp_path: Path) -> None:
    base, worse = answers(90), answers(80)
    text = "'*': {m: {min_ratio_of_base: 0.95}}"
    found = only(judge(rules(tmp_path, text), "memit", [worse], [base]))
    # Five losses and no gain are significant at 0.05, and binom.sf(4, 100, 0.0663) is 0.8.
    assert found.message == (
        "memit  m = 0.8 < min_ratio_of_base 0.95 of 0.9 = 0.855 (n = 100, standard error 0.0402; "
        "a paired test finds drops from 0.0663 with 80% power at level 0.05)"
    )
    assert only(judge(rules(tmp_path, text), "memit", [answers(80, 90)], [base])).message.endswith(
        "standard error 0.0333)"
    )
    assert "paired" not in only(judge(rules(tmp_path, text), "base", [base], [base])).message
    lifted = only(judge(rules(tmp_path, "'*': {m: {max_ratio_of_base: 2}}"), "memit", [worse], [base]))
    assert "paired" not in lifted.message  # a bound where the metric is better


def test_paired_gates_are_corrected_for_each_other(tmp_path: Path) -> None:
    text = "'*': {'*': {no_drop_p: 0.05}}"
    base = [answers(90, metric=name) for name in "abc"]
    worse = [answers(n, metric=name) for n, name in zip((84, 85, 90), "abc", strict=True)]  # p = 2^-6, 2^-5, 1
    found = judge(rules(tmp_path, text), "x", worse, base, gates=3)
    assert [v.passed for v in found] == [False, False, True]  # alone
    settled = settle({"x": found}, 3)["x"]
    assert [v.paired.p_holm for v in settled if v.paired] == [3 * 2**-6, 2 * 2**-5, 1]
    assert [v.passed for v in settled] == [False, True, True]
    assert "after Holm over 3 gates 0.0625" in settled[1].message
    assert [v.passed for v in settle({"x": found[:1]}, 5)["x"]] == [True]  # four more are still to come


def test_what_no_paired_gate_can_judge_fails(tmp_path: Path) -> None:
    base = answers(90)
    broken = replace(base, samples=(*base.samples[1:], math.nan))
    other = replace(base, value=0.1)  # its samples make 0.9
    few = Measurement("m", 3.5, None, 1, True, (3.5,))
    for before, after, reason in (
        ([], base, "the base model was measured in 0 of 1 repeats"),
        ([answers(80, 90)], base, "90 samples of the base model against 100"),
        ([broken], base, "the samples do not average to the value"),
        ([base], other, "the samples do not average to the value"),
        ([few], few, "paired t: a single unit cannot be tested"),
    ):
        found = only(judge(rules(tmp_path, NO_DROP), "memit", [after], before))
        assert not found.passed
        assert f"no_drop_p cannot be judged: {reason}" in found.message
    missing = only(judge(rules(tmp_path, NO_DROP), "memit", [], [base]))
    assert (missing.gate, missing.passed) == ("measured", False)
    assert not only(judge(rules(tmp_path, NO_DROP), "memit", [replace(base, value=math.nan)], [base])).passed


def test_the_base_model_is_no_gate_of_its_own(tmp_path: Path) -> None:
    found = rules(tmp_path, NO_DROP)
    verdict = only(judge(found, "base", [answers(90)], [answers(90)]))
    assert verdict.passed and verdict.paired is None
    assert needs_base(found, "memit")
    assert [paired_gates(found, name, ["m", "k"]) for name in ("base", "memit")] == [0, 1]


def test_repeats_stand_side_by_side_and_the_same_questions_are_averaged(tmp_path: Path) -> None:
    def judged(base: list[Measurement], runs: list[Measurement]) -> Verdict:
        mean = replace(runs[0], value=sum(m.value for m in runs) / len(runs))
        return only(
            judge(
                rules(tmp_path, NO_DROP),
                "x",
                [mean],
                base,
                runs=[(run,) for run in runs],
                base_runs=[(run,) for run in base],
            )
        )

    other = judged([answers(90), answers(80)], [answers(87), answers(77)])
    assert other.paired is not None
    assert (other.paired.test, other.paired.n, other.paired.p) == ("exact McNemar", 200, 2**-6)
    same = judged([answers(90), answers(90)], [answers(87), answers(85)])
    assert same.paired is not None
    assert (same.paired.test, same.paired.n, same.paired.drop) == ("paired t", 100, pytest.approx(0.04))


def test_a_perplexity_is_compared_by_its_windows(tmp_path: Path) -> None:
    def perplexity(nll: list[float]) -> Measurement:
        return Measurement("m", math.exp(math.fsum(nll) / len(nll)), 0.1, len(nll), False, tuple(nll))

    windows = [2 + 0.1 * (i % 7) for i in range(40)]
    base, worse = perplexity(windows), perplexity([x + 0.05 + 0.01 * (i % 3) for i, x in enumerate(windows)])
    found = only(judge(rules(tmp_path, NO_DROP), "x", [worse], [base]))
    assert found.paired is not None and not found.passed
    assert found.paired.test == "paired t"
    assert found.paired.drop == pytest.approx(worse.value - base.value)
    assert only(judge(rules(tmp_path, NO_DROP), "x", [base], [worse])).passed


def test_a_short_window_counts_by_its_tokens(tmp_path: Path) -> None:
    def perplexity(nll: list[float], tokens: list[float]) -> Measurement:
        value = math.exp(sum(w * x for w, x in zip(tokens, nll, strict=True)) / sum(tokens))
        return Measurement("m", value, 0.1, len(nll), False, tuple(nll), weights=tuple(tokens))

    tokens = [128.0] * 20 + [6.0]
    nll = [2 + 0.1 * (i % 5) for i in range(20)]
    base = perplexity([*nll, 3.0], tokens)
    worse = perplexity([*(x + 0.01 * (1 + i % 2) for i, x in enumerate(nll)), 2.0], tokens)
    found = only(judge(rules(tmp_path, NO_DROP), "x", [worse], [base]))
    assert found.paired is not None and not found.passed  # by the mean of windows it would be better
    assert found.paired.drop == pytest.approx(worse.value - base.value)
    other = replace(base, weights=tuple([100.0] * 21), value=math.exp(sum(base.samples) / 21))
    assert "count differently" in only(judge(rules(tmp_path, NO_DROP), "x", [other], [base])).message
