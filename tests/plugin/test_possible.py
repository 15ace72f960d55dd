"""Thresholds that can judge nothing are refused before any work: by the range of a metric, and by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evaluators import Evaluator, Metric, registry
from evaluators.metrics import find_metric, metrics
from pytest_lmcompose.gate.possible import check_metrics
from pytest_lmcompose.gate.thresholds import ThresholdError, read_expression, read_rules
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.run import CONF
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

DATA = SUITE_FOLDER / "tinyworld" / "data"
WORLD = WorldSettings(
    tasks="../tasks",
    pools={"hazardous": ["tinyworld_venomcraft"], "harmless": ["tinyworld_botany"]},
    hazardous=["hazardous"],
)


def check(tmp_path: Path, metric: str, bounds: str) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(f'"memit*":\n  "{metric}": {{{bounds}}}\n')
    check_metrics(read_rules(path), path, WORLD, EvaluateSettings(), DATA)


@pytest.fixture
def laughs() -> Iterator[Evaluator]:
    """An evaluator of another package that says what it measures."""
    kinds = (
        Metric("laughs", "count", low=0, high=10, data="texts", targeted_by=("humour",)),
        Metric("smile/*", "share", higher_is_better=False, low=0, high=1),
    )
    yield registry.register(
        Evaluator("laughs", "how funny it is", "evaluators.settings:NoSettings", "elsewhere:f", kinds)
    )
    registry.evaluators.cache_clear()


NEVER_FAIL = [
    ("recall", "min: -1"),
    ("recall", "min: 0"),
    ("recall", "max: 1"),
    ("recall", "max: 2"),
    ("recall", "min: [0.5, 0]"),
    ("recall", "max_drop: 5"),
    ("recall", "max_drop: {value: 1, of: single}"),
    ("recall", "max_rise: 1"),
    ("recall", "max_loss: 1"),
    ("recall", "max_loss: 150%"),
    ("recall", "max_loss: {value: 100%, of: baseline}"),
    ("recall*", "min: 0"),
    ("recall/born", "max: 1"),
    ("edit_*_exact", "min: 0"),
    ("edit_success_margin", "min: -1"),
    ("edit_success_margin", "max_drop: 2"),
    ("edit_success_exact", "promised: 0"),
    ("accuracy/hazardous", "promised: 1"),
    ("accuracy/harmless", "max_loss: 100%"),
    ("accuracy/tinyworld_botany", "min: 0"),
    ("sparsity", "promised: 1"),
    ("perplexity", "min: 1"),
    ("perplexity*", "min: 0.5"),
    ("average_bits", "max: 64"),
    ("flops_per_token", "min: 0"),
]
NEVER_HOLD = [
    ("recall", "min: 1.5"),
    ("recall", "max: -0.1"),
    ("edit_success_margin", "min: 1.01"),
    ("perplexity", "max: 0.9"),
    ("average_bits", "min: 65"),
    ("edit_success_exact", "promised: 2"),
]
JUDGES = [
    ("recall", "min: 0.01, max: 0.99"),
    ("recall", "min: 1"),
    ("recall", "max: 0"),
    ("recall", "max_drop: 0.99"),
    ("recall", "max_loss: [0.5, 99%, 3se, p0.05]"),
    ("recall", "min_ratio: 2, min_ratio_of_base: 2"),
    ("recall", "max_ratio: 100"),
    ("recall", "no_drop_p: 0.05"),
    ("recall_to_forget", "max_loss: 150%"),
    ("accuracy/hazardous", "max_loss: 150%, promised: 0.4"),
    ("edit_success_margin", "min: 0"),
    ("edit_*", "min: 0"),  # margins may be below
    ("perplexity", "max: 1, max_drop: 5, max_loss: 150%"),
    ("average_bits", "promised: 0.01"),
    ("*", "min: 0"),
    ("exact_match/gsm8k", "max: 1"),
]


@pytest.mark.parametrize(("metric", "bounds"), NEVER_FAIL)
def test_bounds_that_every_value_keeps_are_refused(tmp_path: Path, metric: str, bounds: str) -> None:
    with pytest.raises(ThresholdError, match="can never fail") as error:
        check(tmp_path, metric, bounds)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in ("thresholds.yaml", "memit*", metric, "stricter or remove it"))


@pytest.mark.parametrize(("metric", "bounds"), NEVER_HOLD)
def test_bounds_that_no_value_keeps_are_refused(tmp_path: Path, metric: str, bounds: str) -> None:
    with pytest.raises(ThresholdError, match="can never hold"):
        check(tmp_path, metric, bounds)


@pytest.mark.parametrize(("metric", "bounds"), JUDGES)
def test_bounds_that_judge_are_taken(tmp_path: Path, metric: str, bounds: str) -> None:
    check(tmp_path, metric, bounds)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("recal", "no evaluator measures 'recal'. Did you mean recall"),
        ("edit_sucess_exact", "Did you mean edit_success_exact"),
        ("zzz", "no evaluator measures 'zzz'"),
        ("accuracy/harmles", "no question task or pool 'harmles'. Did you mean harmless?"),
        ("accuracy/tinyworld_botanny", "Did you mean tinyworld_botany"),
    ],
)
def test_a_misspelt_metric_is_refused_with_near_names(tmp_path: Path, metric: str, message: str) -> None:
    with pytest.raises(ThresholdError) as error:
        check(tmp_path, metric, "min: 0.5")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "metric", ["recall/anything", "accuracy/mmlu", "acc_norm/arc", "accuracy/tinyworld_venomcraft"]
)
def test_a_metric_that_only_the_run_can_know_is_left_to_it(tmp_path: Path, metric: str) -> None:
    check(tmp_path, metric, "min: 0.5")


def test_an_expression_is_checked_too() -> None:
    for text, message in (
        ("recall:5", r"did you mean 5%\?"),
        ("recall:150%", "max_loss 150% can never fail"),
        ("recal:5%", "Did you mean recall"),
    ):
        with pytest.raises(ThresholdError, match=message) as error:
            check_metrics([read_expression(text)], Path("x"), WORLD, EvaluateSettings(), DATA)
        assert f"--lmcompose-compare-fail='{text}'" in str(error.value)


@pytest.mark.parametrize("path", sorted((CONF / "thresholds").iterdir()), ids=lambda path: path.name)
def test_the_shipped_thresholds_judge(path: Path) -> None:
    check_metrics(read_rules(path), path, WORLD, EvaluateSettings(), DATA)


def test_metrics_of_another_package_are_described_by_it(tmp_path: Path, laughs: Evaluator) -> None:
    assert find_metric("laughs").targeted_by == ("humour",) and laughs.metrics[0] in metrics()
    assert find_metric("smile/wide").unit == "share"
    check(tmp_path, "laughs", "min: 3")
    for metric, bounds in (("laughs", "max: 10"), ("laughs", "max_drop: 10"), ("smile/wide", "max: 1")):
        with pytest.raises(ThresholdError, match="can never fail"):
            check(tmp_path, metric, bounds)
    with pytest.raises(ThresholdError, match="Did you mean laughs"):
        check(tmp_path, "laughts", "min: 3")


def test_where_an_evaluator_says_nothing_any_name_may_be_its(tmp_path: Path) -> None:
    registry.register(Evaluator("silent", "", "evaluators.settings:NoSettings", "elsewhere:f"))
    try:
        check(tmp_path, "laughs", "min: -3")
        with pytest.raises(ThresholdError, match="can never fail"):
            check(tmp_path, "recall", "min: 0")
    finally:
        registry.evaluators.cache_clear()


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="redefines the evaluator 'recall'"):
        registry.register(Evaluator("recall", "", "a:b", "c:d"))


@pytest.mark.parametrize(
    ("name", "better", "expected"),
    [
        ("accuracy/hazardous", None, (False, ("unlearn",), True)),
        ("accuracy/wmdp_bio", False, (False, ("unlearn",), False)),
        ("accuracy/mmlu", True, (True, (), False)),
        ("edit_locality_exact", None, (True, ("edit",), True)),
        ("edit_locality_f1", None, (True, ("edit",), False)),
        ("perplexity_edits_prompt", None, (False, ("edit",), False)),
        ("perplexity", None, (False, (), True)),
        ("recall_to_forget", None, (False, ("unlearn",), False)),
        ("sparsity_2_4", None, (True, ("compress",), False)),
        ("unheard_of", None, (None, (), False)),
    ],
)
def test_what_is_known_about_metrics(name: str, better: bool | None, expected: object) -> None:
    found = find_metric(name, higher_is_better=better)
    assert (found.higher_is_better, found.targeted_by, found.headline) == expected


def test_a_run_refuses_them_before_any_work(refused: Callable[..., str], pytester: pytest.Pytester) -> None:
    (pytester.path / "thresholds.yaml").write_text('"*": {recall: {min: 0}}\n')
    assert "thresholds.yaml: *: recall: min 0 can never fail" in refused()
    (pytester.path / "thresholds.yaml").write_text('"*": {recal: {min: 0.5}}\n')
    assert "no evaluator measures 'recal'. Did you mean recall" in refused()
