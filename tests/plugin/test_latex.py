"""Tables of composability in LaTeX."""

from __future__ import annotations

import re

from pytest_lmcompose.report import latex
from tests.plugin.documents import typed
from tests.plugin.rich_documents import broken_off, rich


def test_one_row_a_set_of_steps_and_one_column_a_metric() -> None:
    document = rich()
    text = latex.render(typed(document))
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    for kind, table in zip(latex.TABLES, text.split(r"\begin{table}")[1:], strict=True):
        head = re.search(r"\\toprule\n(.*) \\\\", table)
        assert head is not None
        columns = re.split(r"(?<!\\)&", head.group(1))
        assert [name.strip().replace("\\", "") for name in columns] == [
            *("Steps", "edit_success_exact", "recall", "accuracy/harmless", "accuracy/hazardous", "perplexity"),
            "average_bits",
        ]
        assert f"{{l{'r' * 6}}}" in table and f"\\caption{{{kind[1]}." in table
        rows = re.findall(r"^(?!Steps)(.*) \\\\$", table, flags=re.MULTILINE)
        assert len(rows) == 4
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in rows]
        assert {len(row) for row in cells} == {7}
        (entry,) = [
            e for e in document["composability"]["orders"] if e["steps"] == ["awq", "memit"] and e["metric"] == "recall"
        ]
        found = entry[kind[0]]
        assert cells[0][:1] == [r"awq \& memit"]
        assert cells[0][2] == f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def test_the_caption_says_of_what_and_names_stay_text() -> None:
    text = latex.render(typed(rich()))
    assert "seed 0; 95\\,\\% bootstrap intervals in brackets" in text
    assert "recall: n = 120" in text
    body = re.sub(r"\\[&%$#_{}]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))
    assert r"\textless{}/script\textgreater{}" in body
    assert not set('$#%~^<>|"') & set(body)
    assert "_" not in body
    assert body.count("{") == body.count("}")


def test_a_metric_that_some_steps_lack() -> None:
    document = rich(("base", "awq", "memit", "awq+memit", "memit+awq", "rmu", "awq+rmu", "rmu+awq"))
    document["composability"]["orders"] = [
        entry
        for entry in document["composability"]["orders"]
        if not (entry["metric"] == "recall" and "rmu" in entry["steps"])
    ]
    rows = [line for line in latex.render(typed(document)).splitlines() if line.startswith(r"awq \& rmu")]
    assert all(row.split(" & ")[2] == latex.MISSING for row in rows) and len(rows) == 2


def test_a_run_without_two_orders_says_so() -> None:
    text = latex.render(typed(broken_off()))
    assert "there is nothing to compare" in text
    assert all(line.startswith("%") for line in text.splitlines())
