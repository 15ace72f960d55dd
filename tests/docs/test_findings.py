"""The verdicts of docs/findings.py: paired intervals of effects, over reports made without a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pytest_lmcompose.composition import parse
from tests.docs.test_docs import DOCS, module
from tests.plugin import documents


@pytest.fixture(scope="module")
def findings() -> Any:
    return module(DOCS / "findings.py")


def report(**metrics: list[float]) -> Any:
    compositions = {name.replace("_", "+"): {"recall": values} for name, values in metrics.items()}
    return documents.typed(documents.report(compositions))


def test_an_effect_is_the_paired_difference_with_its_t_interval(findings: Any) -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random(40), rng.random(40)
    found = findings.estimate(
        findings.Effect("x", "recall", {"a": 1, "a+b": -1}), report(a=before.tolist(), a_b=after.tolist())
    )
    expected = stats.ttest_rel(before, after).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_a_difference_of_differences_pairs_all_four_states(findings: Any) -> None:
    rng = np.random.default_rng(1)
    a, b, c, d = rng.random((4, 30))
    terms = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    found = findings.estimate(
        findings.Effect("x", "recall", terms), report(a=a.tolist(), b=b.tolist(), c=c.tolist(), d=d.tolist())
    )
    expected = stats.ttest_1samp(a - b - c + d, 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [([0.0] * 9 + [1.0], "agrees"), ([1.0] * 9 + [0.0], "cannot tell"), ([1.0] * 10, "cannot tell")],
)
def test_verdicts_follow_the_interval(findings: Any, after: list[float], verdict: str) -> None:
    both = report(a=[1.0] * 10, b=after)
    assert findings.estimate(findings.Effect("x", "recall", {"a": 1, "b": -1}), both).verdict == verdict
    opposite = {"agrees": "disagrees"}.get(verdict, verdict)
    assert findings.estimate(findings.Effect("x", "recall", {"a": -1, "b": 1}), both).verdict == opposite


def test_what_was_not_measured_has_no_estimate_and_what_cannot_be_paired_is_an_error(findings: Any) -> None:
    effect = findings.Effect("x", "recall", {"a": 1, "b": -1})
    assert findings.estimate(effect, report(a=[1.0, 0.0])) is None
    with pytest.raises(ValueError, match="cannot be paired"):
        findings.estimate(effect, report(a=[1.0, 0.0], b=[1.0]))


@pytest.mark.parametrize(("suite", "least"), [("findings", 8), ("formats", 4)])
def test_every_claim_has_a_source_and_the_suite_measures_it(findings: Any, suite: str, least: int) -> None:
    from pytest_lmcompose.recipe import load_recipe
    from pytest_lmcompose.run import CONF

    measured = {str(parse(name)) for name in load_recipe(CONF, (f"suite={suite}",)).suite.compositions}
    claims = findings.read_claims(DOCS / f"{suite}.yaml")
    assert len(claims) >= least
    for claim, effects in claims:
        assert claim["source"].startswith(("arXiv ", "our own")) and effects
        for effect in effects:
            assert {str(parse(name)) for name in effect.terms} <= measured, effect.name
            assert math.fsum(effect.terms.values()) == 0
