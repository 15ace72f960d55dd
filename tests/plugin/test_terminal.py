"""The summary table."""

from __future__ import annotations

from typing import Any

from pytest_lmcompose.report.terminal import Cell, table


def record(name: str, values: dict[str, float | None], *failed: str, error: str | None = None) -> dict[str, Any]:
    return {
        "id": name,
        "error": error,
        "measurements": [
            {"metric": metric, "value": value, **({"nonfinite": "inf"} if value is None else {})}
            for metric, value in values.items()
        ],
        "gates": [{"metric": metric, "passed": metric not in failed} for metric in ("recall", *failed)],
    }


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
