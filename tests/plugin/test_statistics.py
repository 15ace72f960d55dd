"""Repeats, paired gates and composability, through whole runs on a random model."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pytest_lmcompose.gate import judge
from pytest_lmcompose.gate.paired import Paired
from pytest_lmcompose.report import composability
from tests.plugin.conftest import Project
from tests.plugin.test_run import by_id, read_report

THRESHOLDS = """
"*":
  perplexity: {no_drop_p: 0.05}
  recall: {no_drop_p: 0.05}
  edit_locality_agreement: {no_drop_p: 0.3}
"""
ORDERS = ("nudge[scale=3]+round", "round+nudge[scale=3]")


SHOWN = ("edit_locality_agreement", "perplexity", "recall")


@pytest.mark.parametrize("flag", [None, "--lmcompose-json=report.json", "--junitxml=junit.xml"])
def test_without_a_report_composability_is_that_of_the_metrics_shown(
    project: Project, monkeypatch: pytest.MonkeyPatch, flag: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (project.path / "thresholds.yaml").write_text(THRESHOLDS)
    computed: list[str] = []
    entry = composability._entry

    def noted(steps: Any, found: Any, *others: Any) -> Any:
        computed.append(next(iter(found.values())).metric)
        return entry(steps, found, *others)

    monkeypatch.setattr(composability, "_entry", noted)
    flags = () if flag is None else (flag,)
    result = project.run("--lmcompose-set=evaluate.edits=5", *flags, compose=("round", *ORDERS))
    rows = [line for line in result.outlines if line.startswith("nudge[scale=3] & round  ")]
    assert sorted(row.split()[3] for row in rows) == list(SHOWN)
    result.stdout.fnmatch_lines(["interference: *", "round+nudge[[]scale=3[]]  since round *±*"])
    assert len(computed) == len(set(computed)) and set(computed) >= set(SHOWN)
    assert (set(computed) == set(SHOWN)) is (flag is None)


def measured(record: dict[str, Any], metric: str) -> dict[str, Any]:
    (found,) = [m for m in record["measurements"] if m["metric"] == metric]
    return dict(found)


def test_repeats_and_both_orders_give_intervals_interference_and_paired_gates(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (project.path / "thresholds.yaml").write_text(THRESHOLDS)
    result = project.run(
        "--lmcompose-json=report.json",
        "--lmcompose-repeats=2",
        "--lmcompose-seed=4",
        "--lmcompose-set=evaluate.edits=5",
        compose=("round", *ORDERS),
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED  # such noise in a layer cannot go unnoticed
    result.stdout.fnmatch_lines(
        [
            "round  step 1/1 round *(repeat 2 of 2)",
            "*edit_locality_agreement = * is worse than 1 of the base model at no_drop_p 0.3: p = *, after Holm over "
            "9 gates * (*, n = 5, drop * with standard error *; detects * with 80% power at level 0.0333*",
            "paired tests against the base model; *",
            "round  perplexity *",
            "composability, with 95% intervals",
            "nudge[[]scale=3[]] & round  perplexity * [[]*, *[]] * [[]*, *[]]",
            "interference: *",
            "round+nudge[[]scale=3[]]  since round *±*",
        ]
    )
    report = read_report(project.path / "report.json")
    records = by_id(report)
    assert (report["seed"], report["repeats"]) == (4, 2)
    order = records[ORDERS[0]]
    assert [repeat["seed"] for repeat in order["repeats"]] == [4, 5]
    assert len({repeat["state_hash"] for repeat in order["repeats"]}) == 2  # other edits and other random numbers
    success = measured(order, "edit_success_f1")
    assert success["value"] == pytest.approx(sum(r["value"] for r in success["repeats"]) / 2)
    assert success["samples"] == [x for r in success["repeats"] for x in r["samples"]]
    assert success["n"] == sum(r["n"] for r in success["repeats"]) == 10

    verdict = next(g for g in order["gates"] if g["metric"] == "perplexity")
    base = measured(records["base"], "perplexity")
    assert (verdict["passed"], verdict["base_value"]) == (True, pytest.approx(base["value"]))
    assert verdict["paired"]["n"] == base["repeats"][0]["n"]  # the same text in both repeats counts once
    assert verdict["paired"]["drop"] == pytest.approx(verdict["value"] - verdict["base_value"], abs=0.2)

    entries = {entry["metric"]: entry for entry in report["composability"]["orders"]}
    values = [measured(records[name], "perplexity")["value"] for name in ORDERS]
    entry = entries["perplexity"]
    assert entry["order_free_error"]["value"] == min(values)
    assert entry["order_sensitivity"]["value"] == pytest.approx(abs(values[0] - values[1]))
    assert entry["order_free_error"]["low"] < min(values) < entry["order_free_error"]["high"]
    assert entry["best"] == ORDERS[values.index(min(values))]
    (interference,) = report["composability"]["interference"]  # nudge alone was not measured
    assert interference["composition"] == ORDERS[1]
    column = interference["metrics"].index("perplexity")
    change = values[1] - measured(records["round"], "perplexity")["value"]
    assert interference["steps"][0]["change"][column] == pytest.approx(change)
    assert interference["steps"][1]["change"][column] == 0
    assert report["composability"]["survival"] == []  # the edit alone was not measured


def test_the_first_repeat_is_the_run_without_repeats(project: Project) -> None:
    for name, repeats in (("one", "1"), ("two", "2")):
        project.run(f"--lmcompose-json={name}.json", f"--lmcompose-repeats={repeats}", compose=("round+nudge",))
    one, two = (by_id(read_report(project.path / f"{name}.json"))["round+nudge"] for name in ("one", "two"))
    assert "repeats" not in one
    assert two["state_hash"] == two["repeats"][0]["state_hash"] == one["state_hash"]
    assert measured(two, "recall")["repeats"][0]["samples"] == measured(one, "recall")["samples"]
    assert len({repeat["state_hash"] for repeat in two["repeats"]}) == 2  # the seeds differ


def test_what_survives_of_an_edit_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ids = ("nudge", "nudge+round", "nudge+round+nudge")
    result = project.run("--lmcompose-json=report.json", "--lmcompose-repeats=2", "-v", compose=ids)
    result.stdout.fnmatch_lines(
        ["interference: *", "survival: *", "nudge+round  since nudge *", "nudge+round+nudge  since nudge *"]
    )
    report = read_report(project.path / "report.json")
    found = [s for s in report["composability"]["survival"] if s["metric"] == "edit_locality_agreement"]
    assert [(s["composition"], s["step"], s["prefix"]) for s in found] == [(i, "nudge", "nudge") for i in ids[1:]]
    after, end = (measured(by_id(report)[i], "edit_locality_agreement")["value"] for i in ids[:2])
    assert found[0]["value"] == pytest.approx(end / after)
    assert report["composability"]["returned"] == []


def test_a_gate_that_fails_only_beside_all_others_fails_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.path / "thresholds.yaml").write_text('"*": {recall: {no_drop_p: 0.05}}')
    found = Paired("paired t", 10, 0.1, 0.01, 0.03, 0.03, 2, 0.02, 0.8, 0.025)
    # 0.03 alone passes, as another gate is still to come; beside 0.001 it is the last one of Holm's list.
    answers = iter([(msgspec.structs.replace(found, p=p), 0.9) for p in (0.03, 0.001)])
    monkeypatch.setattr(judge, "compare_with_base", lambda *_: next(answers))
    project.pytester.makepyfile(test_inner="def test_it(composition, gates): ...")
    result = project.run("--lmcompose-json=report.json", compose=("nudge", "round"))
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["failed when all paired gates were judged together: nudge  recall = *"])
    records = by_id(read_report(project.path / "report.json"))
    verdicts = [records[name]["gates"][0] for name in ("nudge", "round")]
    assert [verdict["passed"] for verdict in verdicts] == [False, False]
    assert [verdict["paired"]["p_holm"] for verdict in verdicts] == [0.03, 0.002]


def test_a_state_held_by_a_test_outlives_the_repeats(project: Project) -> None:
    project.pytester.makepyfile(
        test_inner="""
        def test_it(composition, intervened_model, measurements):
            from pytest_lmcompose.build.load import hash_weights
            assert hash_weights(intervened_model.model) == intervened_model.state_hash
        """
    )
    project.run("--lmcompose-repeats=2", compose=("nudge", "base")).assert_outcomes(passed=2)


def test_a_pool_is_one_gate_in_every_report(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (project.path / "thresholds.yaml").write_text(
        '"*": {"edit_*": {no_drop_p: {value: 0.3, pool: true}}, recall*: {not_worse_than: {margin: 0.01, pool: true}}}'
    )
    flags = ("--lmcompose-json=report.json", "--lmcompose-html=report.html", "--lmcompose-markdown=report.md")
    result = project.run("--lmcompose-set=evaluate.edits=5", *flags, compose=("nudge[scale=3]",))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["paired tests against the base model; *", "*nudge[[]scale=3[]]  edit_[*] (* metrics) *", "evidence against *"]
    )
    (record,) = [r for r in read_report(project.path / "report.json")["compositions"] if r["id"] == "nudge[scale=3]"]
    for gate in record["gates"]:
        if gate.get("pool"):
            names = {member["metric"] for member in gate["pool"]}
            assert len(names) == len(gate["pool"]) > 1 and names <= {m["metric"] for m in record["measurements"]}
            assert f"{gate['metric']} ({len(names)} metrics)" in (project.path / "report.html").read_text()
    assert [gate["metric"] for gate in record["gates"] if gate.get("pool")].count("edit_*") >= 1
    assert "over " in (project.path / "report.md").read_text()
