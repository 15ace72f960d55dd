"""The summary table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_lmcompose.report.layout import unmatched
from pytest_lmcompose.report.options import Layout
from pytest_lmcompose.report.terminal import Cell, table
from pytest_lmcompose.results import CompositionResult, replace
from tests.plugin import documents
from tests.plugin.conftest import Project
from tests.plugin.documents import measurement, typed_record


def record(name: str, values: dict[str, float | None], *failed: str, error: str | None = None) -> CompositionResult:
    found = []
    for metric, value in values.items():
        whole = measurement(metric, 0.0, None, [1.0], better=metric != "perplexity")
        found.append(whole | {"value": value} | ({"nonfinite": "inf"} if value is None else {}))
    gate = {"gate": "min", "threshold": 0.5, "message": "", "value": 1.0, "base_value": None}
    gates = [{**gate, "metric": metric, "passed": metric not in failed} for metric in ("recall", *failed)]
    return typed_record(documents.record(name, found, gates=gates, error=error))


RECORDS = [
    record("base", {"recall": 1.0, "perplexity": 1234.5, "other": 0.0}),
    record("memit+awq", {"recall": 0.25, "perplexity": None, "other": 0.0}, "recall", "speed"),
    record("awq", {}, error="BuildError"),
]


def test_composition_by_metric_with_failures_marked() -> None:
    (block,) = table(RECORDS, 200, lambda metric: metric == "perplexity")
    assert block == [
        [Cell("composition"), Cell("recall"), Cell("perplexity"), Cell("speed")],
        [Cell("base"), Cell("1.000"), Cell("1234"), Cell("-")],
        [Cell("memit+awq"), Cell("0.250", True), Cell("inf"), Cell("-", True)],
        [Cell("awq", True), Cell("-"), Cell("-"), Cell("-")],
    ]


def test_known_losses_are_marked() -> None:
    lost = replace(RECORDS[0], gates=tuple(replace(gate, gate="lost") for gate in RECORDS[0].gates))
    (block,) = table([lost], 200, lambda metric: False)
    assert block[1] == [Cell("base"), Cell("1.000", lost=True)] and block[1][1].state == "lost"


def test_metrics_that_do_not_fit_go_into_another_block() -> None:
    blocks = table(RECORDS, 30, lambda metric: True)
    heads = [[cell.text for cell in block[0]] for block in blocks]
    assert heads == [
        ["composition", "recall"],
        ["composition", "perplexity"],
        ["composition", "other", "speed"],
    ]
    for block in blocks:
        widths = [max(len(cell.text) + 1 for cell in column) for column in zip(*block, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= 30


def test_a_column_too_wide_for_any_block_still_shows() -> None:
    blocks = table(RECORDS, 5, lambda metric: False)
    assert [cell.text for block in blocks for cell in block[0]] == [
        "composition",
        "recall",
        "composition",
        "speed",
    ]


def ordered(layout: Layout) -> list[str]:
    """Return the first column of the table of some records, without its head."""
    records = [
        row("base", [], 0.9, 10.0),
        row("memit+awq", ["memit", "awq"], 0.5, None),
        row("awq", ["awq"], 0.7, 30.0),
        row("awq+memit", ["awq", "memit"], None, 20.0),
        row("rmu", ["rmu"], 0.8, 12.0),
    ]
    (block,) = table(records, 500, lambda _: True, layout)
    return [line[0].text for line in block[1:]]


def row(name: str, requested: list[str], recall: float | None, perplexity: float | None) -> CompositionResult:
    return replace(record(name, {"recall": recall, "perplexity": perplexity}), requested=tuple(requested))


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("recall", ["base", "rmu", "awq", "memit+awq", "awq+memit"]),
        ("-recall", ["memit+awq", "awq", "rmu", "base", "awq+memit"]),
        ("perplexity", ["base", "rmu", "awq+memit", "awq", "memit+awq"]),  # better low; what has no value stands last
        ("id", ["awq", "awq+memit", "base", "memit+awq", "rmu"]),
        ("-id", ["rmu", "memit+awq", "base", "awq+memit", "awq"]),
        (None, ["base", "memit+awq", "awq", "awq+memit", "rmu"]),
    ],
)
def test_sorted_by(sort: str | None, expected: list[str]) -> None:
    assert ordered(Layout(sort=sort)) == expected


def test_grouped_by() -> None:
    assert ordered(Layout(group="category", sort="recall")) == [
        *("base:", "  base", "unlearn:", "  rmu", "compress:", "  awq"),
        *("edit + compress:", "  memit+awq", "compress + edit:", "  awq+memit"),
    ]
    assert ordered(Layout(group="first")) == [
        *("base:", "  base", "memit:", "  memit+awq", "awq:", "  awq", "  awq+memit", "rmu:", "  rmu"),
    ]


def test_columns_by_globs_in_their_order() -> None:
    (block,) = table(RECORDS, 500, lambda _: True, Layout(columns=("other", "*p*", "recal")))
    assert [cell.text for cell in block[0]] == ["composition", "other", "perplexity", "speed"]
    assert list(unmatched(RECORDS, Layout(columns=("other", "recal"), sort="-recal"))) == [
        "--lmcompose-columns: no metric 'recal' was measured. Did you mean recall?",
        "--lmcompose-sort: no metric 'recal' was measured. Did you mean recall?",
    ]


def test_flags_of_the_table_and_colour_on_a_terminal_only(project: Project) -> None:
    arguments = ("--lmcompose-columns=perplexity,edit_*_f1", "--lmcompose-sort=-id", "--lmcompose-group=first")
    (project.path / "thresholds.yaml").write_text('"*":\n  perplexity: {max: 1.0}\n')
    result = project.run(*arguments, compose=("base", "nudge", "nudge+round"))
    lines = [line.split() for line in result.stdout.lines]
    head = next(line for line in lines if line[:1] == ["composition"])
    assert head[1:] == ["perplexity", "edit_success_f1", "edit_paraphrase_f1"]  # the next one is in another block
    first = [line[0] for line in lines[lines.index(head) + 1 :] if line]
    assert first[:5] == ["nudge:", "nudge+round", "nudge", "base:", "base"]
    assert "\x1b[" not in result.stdout.str()
    coloured = project.run("--color=yes", "--lmcompose-columns=perplexity", compose=("base",)).stdout.str()
    assert "\x1b[31m" in coloured[coloured.index("lmcompose ====") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lmcompose-group=method", "--lmcompose-group: expected category or first, not 'method'"),
        ("--lmcompose-sort=-", "--lmcompose-sort: expected the name of a metric, or id, not '-'"),
    ],
)
def test_refused(refused: Callable[..., str], arguments: str, message: str) -> None:
    assert message in refused(arguments)


SUBTESTS = """
import pytest

def test_it(composition, gates, subtests):
    for gate in gates:
        with subtests.test(gate.metric):
            if not gate.passed:
                pytest.fail(gate.message, pytrace=False)
"""


def test_a_failed_gate_is_counted_once_and_the_end_says_what_to_try(project: Project) -> None:
    project.pytester.makepyfile(test_inner=SUBTESTS)
    (project.path / "thresholds.yaml").write_text("'*': {perplexity: {max: 1}, edit_success_f1: {max: 0.99}}")
    result = project.run(compose=("nudge",))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes() == {"failed": 1}
    result.stdout.fnmatch_lines(
        [
            "lmcompose: 1 composition of the model *, on the world *",
            "nudge  [[]1/1[]]: * s to measure",
            "next: perplexity: *",
        ]
    )
