"""Joining reports: shards give what the whole run gives; what does not belong together is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pytest_lmcompose.cli import main
from pytest_lmcompose.merge import MergeError, merge
from pytest_lmcompose.results import encode
from tests.plugin.conftest import Project
from tests.plugin.documents import typed
from tests.plugin.test_cache import without_times
from tests.plugin.test_run import by_id, read_report

IDS = ("nudge", "nudge+round[digits=1]", "round[digits=1]", "round[digits=1]+nudge")
Report = dict[str, Any]


@pytest.fixture
def reports(project: Project) -> dict[str, Report]:
    """The report of a run, and of both shards of it."""
    (project.path / "thresholds.yaml").write_text(
        "'*': {perplexity: {max_ratio_of_base: 100, no_drop_p: 0.02}}\n"
        "round*: {recall: {max: 0.99}}\nmemit: {perplexity: {min: 2}}"
    )
    for name, arguments in (("whole", ()), ("one", ("--lmcompose-shard=1/2",)), ("two", ("--lmcompose-shard=2/2",))):
        project.run(f"--lmcompose-json={name}.json", "--lmcompose-repeats=2", *arguments, compose=IDS)
    return {name: read_report(project.path / f"{name}.json") for name in ("whole", "one", "two")}


def join(reports: dict[str, Report], *, partial: bool = False) -> tuple[Report, tuple[str, ...]]:
    """Return the joined report as plain data, and the gates that fail only now."""
    found = merge({name: typed(report) for name, report in reports.items()}, partial=partial)
    return json.loads(encode(found.report)), found.late


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["merge", *arguments])


def test_the_shards_of_a_run_give_what_the_whole_run_gives(
    reports: dict[str, Report], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.path)
    result = call("one.json", "two.json", "-o", "merged.json")
    merged = read_report(project.path / "merged.json")
    parts = [by_id(reports[name]) for name in ("one", "two")]
    assert set(parts[0]) & set(parts[1]) == {"base"}
    assert [part["shard"]["index"] for part in merged.pop("merged")] == [1, 2]
    whole = without_times(reports["whole"])
    joined = without_times(merged)
    for report in (whole, joined):
        report["compositions"] = by_id(report)
        report["prompts"] = {(p["seed"], metric): p["texts"] for p in report["prompts"] for metric in p["metrics"]}
    assert joined == whole
    gates = [gate for record in joined["compositions"].values() for gate in record["gates"] if "paired" in gate]
    assert {gate["paired"]["gates"] for gate in gates} == {len(IDS)} and whole["composability"]["orders"]
    failed = sum(not gate["passed"] for record in joined["compositions"].values() for gate in record["gates"])
    assert result.exit_code == (1 if failed else 0)
    assert result.output.splitlines()[-1] == (
        f"merged.json: 5 compositions of 2 reports, finished, {failed} gate{'s' * (failed != 1)} failed"
    )
    _refusals(reports)
    _commands(reports, project.path)
    _late(reports)


def change(**fields: Any) -> Callable[[Report], None]:
    """Return what sets fields deep in a report, named as in model__dtype."""

    def changed(report: Report) -> None:
        for path, value in fields.items():
            *above, last = path.split("__")
            inner = report
            for key in above:
                inner = inner[key]
            inner[last] = value

    return changed


def base(**fields: Any) -> Callable[[Report], None]:
    return lambda report: change(**fields)(by_id(report)["base"])


def other_step(report: Report) -> None:
    next(step for record in report["compositions"] for step in record["steps"])["settings"] = {"digits": 7}


def other_value(report: Report) -> None:
    by_id(report)["base"]["measurements"][0]["repeats"][0]["value"] += 0.5


def other_rule(report: Report) -> None:
    report["plan"]["rules"][0]["bounds"][0]["value"] = 3


def lose(name: str) -> Callable[[Report], None]:
    return lambda report: report["compositions"].remove(by_id(report)[name])


def unjudge(name: str) -> Callable[[Report], None]:
    return lambda report: by_id(report)[name]["gates"].clear()


REFUSED: list[tuple[Callable[[Report], None], str]] = [
    (change(model__weight_hash="f" * 64), "model: weights: [0-9a-f]{12} -> ffffffffffff"),
    (change(model__dtype="bfloat16"), "model: dtype: float32 -> bfloat16"),
    (change(model__device="cuda:1"), "model: device: cpu -> cuda"),
    (change(seed=5), "seed: seed 0, 2 repeats -> seed 5, 2 repeats"),
    (change(environment__packages__torch="1.0"), "versions: torch: .* -> 1.0"),
    (change(recipe__evaluate__edits=99), "settings: evaluate.edits: 3 -> 99"),
    (other_step, r"settings of round\[digits=1\]: digits: 1 -> 7"),
    (other_value, "base was measured twice, with different results: "),
    (base(measurements=[]), "base was measured twice, with different results: only one has "),
    (base(status="failed", error="MemoryError"), r"base failed in b \(MemoryError\); run that one again"),
    (change(shard={"index": 2, "count": 3}), "a is one of 2 shards and b is one of 3"),
    (change(shard={"index": 1, "count": 2}), "a and b are both shard 1 of 2"),
    (change(plan__compositions=["nudge"]), "selection: only the first tests nudge"),
    (change(plan__judged=[]), "selection: only the first judges nudge"),
    (change(plan__steps={"nudge": {"scale": 5}}), "settings of nudge: scale: 0.01 -> 5"),
    (change(plan__baseline={"file": "1.json", "started": ""}), "compared with different stored runs: None -> 1.json"),
    (change(plan=None), "b does not say what the whole run tests"),
    (other_rule, "thresholds: only the first has '\\*': 'perplexity': max_ratio_of_base 100"),
    (lambda report: report.pop("shard"), "a is a shard of a run and b is a whole run"),
    (change(status="interrupted"), "b was interrupted: run it again"),
    (lose("round[digits=1]+nudge"), r"round\[digits=1\]\+nudge was not tested"),
    (unjudge("round[digits=1]+nudge"), r"round\[digits=1\]\+nudge was not judged"),
]


def _refusals(reports: dict[str, Report]) -> None:
    for changed, message in REFUSED:
        second = copy.deepcopy(reports["two"])
        changed(second)
        with pytest.raises(MergeError, match=message) as caught:
            join({"a": reports["one"], "b": second})
        assert all(re.match(r"a and b |a is |b |round", line) for line in str(caught.value).splitlines())
    # What may differ between machines does not count.
    second = copy.deepcopy(reports["two"])
    change(environment__cores=64, model__location="/elsewhere", recipe__model__path="elsewhere")(second)
    by_id(second)["base"]["measurements"][0]["repeats"][0]["value"] *= 1 + 1e-7
    assert by_id(join({"a": reports["one"], "b": second})[0]).keys() == {"base", *IDS}
    # A shard that had nothing to do knows no model.
    whole = {**copy.deepcopy(reports["whole"]), "shard": reports["one"]["shard"]}
    empty = {**copy.deepcopy(reports["two"]), "model": None, "compositions": [], "composability": None}
    found = join({"empty": empty, "one": whole})[0]
    assert found["model"] == reports["one"]["model"] and found["status"] == "finished"
    stopped = {**reports["two"], "status": "interrupted"}
    assert join({"a": reports["one"], "b": stopped}, partial=True)[0]["status"] == "interrupted"
    with pytest.raises(MergeError, match=r"shard 2 of 2 is missing"):
        join({"a": reports["one"]})
    # Every problem has a line, also where the first shard knows no model.
    other = copy.deepcopy(reports["one"])
    change(seed=5, model__dtype="float16", environment__python="3.0")(other)
    with pytest.raises(MergeError) as caught:
        join({"empty": empty, "one": reports["one"], "other": other})
    assert len(str(caught.value).splitlines()) == 4
    part = join({"a": reports["one"]}, partial=True)[0]
    assert part["status"] == "interrupted"
    assert join({"a": part, "b": reports["two"]})[0]["merged"] == [
        *part["merged"],
        {key: reports["two"][key] for key in ("status", "started", "finished", "shard", "environment")},
    ]


def _commands(reports: dict[str, Report], folder: Path) -> None:
    (folder / "other.json").write_text(json.dumps({**reports["two"], "seed": 3}))
    refused = call("one.json", "other.json", "-o", "none.json")
    assert refused.exit_code == 2 and not (folder / "none.json").exists()
    assert "one.json and other.json do not belong together: seed: " in refused.output
    (folder / "cut.json").write_text(json.dumps(reports["two"])[:500])
    assert "cut.json is broken" in call("one.json", "cut.json", "-o", "none.json").output
    partial = call("one.json", "--partial", "-o", "part.json")
    assert partial.exit_code == 1 and read_report(folder / "part.json")["status"] == "interrupted"
    nowhere = call("one.json", "two.json", "-o", "no/such/folder.json")
    assert nowhere.exit_code == 2 and "no/such does not exist; create it first" in nowhere.output


def _late(reports: dict[str, Report]) -> None:
    def judged(name: str, p: float) -> Report:
        report = copy.deepcopy(reports[name])
        for record in report["compositions"]:
            for gate in record["gates"]:
                if "paired" in gate:
                    gate["threshold"] = 0.05
                    gate["passed"] = True
                    gate["paired"] |= {"p": p, "p_holm": min(1.0, 4 * p), "gates": 4}
        return report

    # Alone, the second half's p of 0.02 is 0.08 after Holm over four gates; behind two smaller ones it is 0.04.
    _, late = join({"a": judged("one", 0.001), "b": judged("two", 0.02)})
    assert len(late) == 4 and all("no_drop_p 0.05" in message for message in late)
