"""The main job, end to end: the suite on the embedded model, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.started import run_pytest

ROOT = Path(__file__).parents[1]
# Little of everything; the whole job is `make demo`, and the slow tests of the release gate.
SMALL = (
    *("evaluate.edits=4", "evaluate.facts=16", "evaluate.texts=4", "evaluate.question_limit=2"),
    *("memit.covariance_tokens=2000", "memit.z.steps=15", "memit.contexts_per_length=2"),
    *("awq.samples=8", "awq.grid=4", "awq.search_tokens=64"),
)


def test_both_orders_of_memit_and_awq_are_built_measured_and_judged_on_the_embedded_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    settings = [f"--lmcompose-set={setting}" for setting in SMALL]
    arguments = ("-k", "memit and awq", "--lmcompose-no-cache", f"--lmcompose-json={report}", *settings)
    run = run_pytest(ROOT, *arguments, timeout=400)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    assert "memit+awq  step 1/2 memit" in run.stdout
    assert "awq+memit  step 2/2 memit" in run.stdout

    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["status"] == "finished"
    found = {composition["id"]: composition for composition in document["compositions"]}
    assert set(found) == {"base", "memit+awq", "awq+memit"}
    assert len({composition["state_hash"] for composition in found.values()}) == 3
    for order in ("memit+awq", "awq+memit"):
        assert [step["method"] for step in found[order]["steps"]] == order.split("+")
        assert all(step["changed"] for step in found[order]["steps"])
        assert found[order]["error"] is None
        assert found[order]["gates"]
        success = {m["metric"]: m["value"] for m in found[order]["measurements"]}["edit_success_exact"]
        assert success > {m["metric"]: m["value"] for m in found["base"]["measurements"]}["edit_success_exact"]
    # So few edits are too few to promise that every gate holds; what is promised is that the exit status tells.
    passed = [gate["passed"] for composition in found.values() for gate in composition["gates"]]
    assert (run.returncode == 0) == all(passed)
