"""The simulated level and power of gates in docs/gates.md: its table is the script's, and a few runs agree with it."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from tests.docs.test_docs import DOCS, module

RUNS = 40


@pytest.fixture(scope="module")
def power() -> Any:
    return module(DOCS / "power.py")


def rows() -> list[list[str]]:
    """Return the cells of the page's table."""
    section = (DOCS / "gates.md").read_text(encoding="utf-8").partition("## Level and power")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_a_row_for_each_kind_of_gate(power: Any) -> None:
    assert [(row[0], row[1], row[4]) for row in rows()] == [(k.gate, k.samples, k.truth) for k in power.KINDS]


def test_levels_hold_but_for_skewed_samples_without_a_range() -> None:
    above = [row[1] for row in rows() if float(row[2].rstrip("%")) > 5.5]  # 2.3 standard errors of 10,000 runs
    assert all("without a range" in samples for samples in above)


def test_a_few_runs_agree_with_the_page(power: Any) -> None:
    for (kind, *found), row in zip(power.simulate(RUNS), rows(), strict=True):
        for share, shown in zip(found, row[2:4], strict=True):
            expected = min(max(float(shown.rstrip("%")) / 100, 0.002), 0.998)
            p = stats.binomtest(round(share * RUNS), RUNS, expected).pvalue
            assert p > 1e-5, f"{kind.gate}, {kind.samples}: {share:.0%} of {RUNS} runs, the page says {shown}"
