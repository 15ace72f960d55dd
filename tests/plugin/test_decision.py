"""The first screen of a page: whether to ship, why, the cheapest fix, and how sure that is."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from lxml import html as lxml_html

from pytest_lmcompose.report import html
from pytest_lmcompose.report.closeness import closeness_rows
from pytest_lmcompose.report.collect import SCHEMA_PATH
from pytest_lmcompose.report.decision import Decision, decide, in_words
from pytest_lmcompose.results import Fix
from tests.plugin.documents import gate, measurement, record, report, step, typed

HALF = [1.0, 0.0] * 20


def judged(name: str, value: float, limit: float, **more: Any) -> dict[str, Any]:
    """Return a result with `recall` of 40 facts and its gate, `min` unless `more` says something else."""
    right = round(40 * value)
    found = measurement("recall", value, 0.08, [1.0] * right + [0.0] * (40 - right), better=True)
    bound = gate("recall", passed=value >= limit) | {"threshold": limit, "value": value, "message": "recall says so"}
    steps = [] if name == "base" else name.split("+")
    return record(name, [found], gates=[bound | more], steps=[step(one, "compress") for one in steps])


def decision(*records: dict[str, Any], **more: Any) -> Decision:
    document = {**report({}), "compositions": list(records), **more}
    jsonschema.validate(document, json.loads(SCHEMA_PATH.read_text()))
    return decide(typed(document))


def test_ship() -> None:
    found = decision(judged("base", 0.9, 0.5), judged("awq", 0.85, 0.75))
    assert (found.verdict, found.state, found.reasons, found.fixes) == ("Ship: all 2 gates passed", "passed", (), ())
    assert found.sure[0] == "The closest pass, recall of awq, is 1.2 standard errors within its limit."
    assert found.sure[1].startswith("1 of 2 passed gates with a limit: less than 2 standard errors from it")


def test_the_worst_failure_comes_first() -> None:
    found = decision(judged("awq", 0.7, 0.75), judged("memit", 0.25, 0.75), judged("rtn", 0.9, 0.75))
    assert found.verdict == "Do not ship: 2 of 3 gates failed"
    assert found.green == "1 of 3 compositions passed all gates: rtn"
    assert [reason.composition for reason in found.reasons] == ["memit", "awq"]
    assert found.reasons[0].text == "recall is 0.250, but must be at least 0.750"
    assert found.sure[0] == "The clearest failure, recall of memit, is 6.2 standard errors beyond its limit."


def test_what_was_not_measured_comes_before_all() -> None:
    broken = record("rmu", [], status="failed", error="BuildError: no memory", state_hash=None)
    found = decision(judged("awq", 0.25, 0.75), broken)
    assert found.reasons[0] == ("rmu", "was not measured: BuildError: no memory")


@pytest.mark.parametrize(
    ("kind", "limit", "text"),
    [
        ("min_ratio_of_base", 0.9, "recall is 0.500, but must be at least 0.810; the base model has 0.900"),
        ("max_drop", 0.1, "recall is 0.500, but must be at least 0.800; the base model has 0.900"),
        ("max_loss", 0.1, "recall is 0.500, but must be at least 0.800; the base model has 0.900"),
    ],
)
def test_limits_that_depend_on_the_base_model_are_worked_out(kind: str, limit: float, text: str) -> None:
    found = typed({**report({}), "compositions": [judged("awq", 0.5, limit, gate=kind, base_value=0.9, passed=False)]})
    assert in_words(found.compositions[0], found.compositions[0].gates[0]) == text


def test_another_order_that_passed_is_the_cheapest_fix() -> None:
    found = decision(judged("awq+memit", 0.5, 0.75), judged("memit+awq", 0.9, 0.75), judged("memit", 0.9, 0.75))
    assert [(fix.composition, fix.use) for fix in found.fixes] == [("awq+memit", "memit+awq")]
    assert found.fixes[0].note.startswith("the same steps in another order")


def test_one_more_step_that_passed_is_the_next() -> None:
    found = decision(judged("awq+memit", 0.5, 0.75), judged("awq+memit+awq", 0.9, 0.75))
    assert [(fix.use, fix.note.partition(";")[0]) for fix in found.fixes] == [
        ("awq+memit+awq", "the same steps and one more")
    ]


def test_a_promise_that_a_later_step_broke_is_made_again() -> None:
    broken = judged("awq+memit", 0.5, 0.75) | {
        "steps": [step("awq", "compress") | {"promises": {"recall": 0.9}}, step("memit", "edit")]
    }
    (fix,) = decision(broken).fixes
    assert (fix.use, fix.note) == ("awq+memit+awq", "repeats the step whose promise a later one broke; not tested")


def test_a_repair_in_the_report_goes_first() -> None:
    repair = {"composition": "awq+memit", "use": "memit+awq[bits=5]", "note": "one bit more"}
    found = decision(judged("awq+memit", 0.5, 0.75), judged("memit+awq", 0.9, 0.75), repairs=[repair])
    assert found.fixes == (Fix("awq+memit", "memit+awq[bits=5]", "one bit more"),)


def test_the_page_names_the_command_where_no_fix_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "missing_figures", lambda: "none here")
    document = {**report({}), "compositions": [judged("awq", 0.5, 0.75), judged("memit+awq", 0.6, 0.75)]}
    tree = lxml_html.fromstring(html.render(typed(document)))
    (section,) = tree.xpath("//section[@aria-labelledby='fix-title']")
    assert " ".join(section.text_content().split()) == (
        "Cheapest fix None is known for awq, memit+awq. Search for one with the options of this run: "
        "lmcompose repair 'awq' 'memit+awq'"
    )
    assert tree.xpath("//h1")[0].text_content() == "Do not ship: 2 of 2 gates failed"


def test_closeness_has_a_table_of_its_own() -> None:
    names = ["recall", "kl_to_base", "flips/recall", "flips/accuracy/one_task", "churn/recall"]
    found = [measurement(name, 0.25, 0.08, HALF, better=False) for name in names]
    records = typed({**report({}), "compositions": [record("base", found), record("awq", found)]}).compositions
    head, row = closeness_rows(records)
    assert head == ["composition", "kl_to_base", "flips/recall", "churn/recall"]
    assert row == ["awq", *["0.250 ±0.080"] * 3]
    assert closeness_rows(records[:1]) == []
