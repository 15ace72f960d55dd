"""Properties in JUnit XML, of tests and of the run; those that come from workers are tested in test_markdown.py."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

import pytest

from pytest_lmcompose.composition import parse
from pytest_lmcompose.composition_run import Result
from pytest_lmcompose.report.collect import Collected
from pytest_lmcompose.report.junit import properties_of, run_properties
from tests.plugin.conftest import Project
from tests.plugin.documents import typed_record
from tests.plugin.rich_documents import rich


def properties(element: ElementTree.Element) -> dict[str, str]:
    return {p.attrib["name"]: p.attrib["value"] for p in element.findall("properties/property")}


def read(path: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the properties of the run, and those of each test by its composition."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    of_tests = [properties(case) for case in suite.iter("testcase")]
    return properties(suite), {found["lmcompose.composition"]: found for found in of_tests if found}


def check(folder: Path, failed: bool) -> None:
    """Compare the properties in junit.xml with report.json."""
    suite, tests = read(folder / "junit.xml")
    report = json.loads((folder / "report.json").read_text())
    assert tests
    for record in report["compositions"]:
        found = tests.get(record["id"])
        if found is None:  # the base model, for comparison only
            continue
        assert found["lmcompose.state"] == record["state_hash"]
        for measured in record["measurements"]:
            assert float(found[f"lmcompose.metric.{measured['metric']}"]) == measured["value"]
        for gate in record["gates"]:
            said = "passed" if gate["passed"] else "failed"
            assert found[f"lmcompose.gate.{gate['metric']}.{gate['gate']}"] == f"{said}: {gate['message']}"
        assert "lmcompose" not in found  # what travels from workers is taken out
    assert suite["lmcompose.status"] == "finished"
    assert suite["lmcompose.model.weight_hash"] == report["model"]["weight_hash"]
    assert (suite["lmcompose.gates.failed"] != "0") is failed
    (entry,) = [e for e in report["composability"]["orders"] if e["metric"] == "perplexity"]
    shown = float(suite["lmcompose.order_sensitivity.nudge&round.perplexity"])
    assert shown == entry["order_sensitivity"]["value"]


def test_metrics_and_verdicts(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text('"*":\n  edit_success_f1: {max: 0.99}\n  perplexity: {max: 1}\n')
    arguments = ("--junitxml=junit.xml", "--lmcompose-json=report.json")
    result = project.run(*arguments, compose=("nudge", "nudge+round", "round+nudge"))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    check(project.path, failed=True)
    suite, tests = read(project.path / "junit.xml")
    assert set(tests) == {"nudge", "nudge+round", "round+nudge"}
    assert (suite["lmcompose.gates"], suite["lmcompose.gates.failed"]) == ("6", "3")
    assert tests["nudge"]["lmcompose.gate.edit_success_f1.max"].startswith("passed: nudge  edit_success_f1 = ")
    assert tests["nudge"]["lmcompose.gate.perplexity.max"].startswith("failed: nudge  perplexity = ")


def test_known_losses_are_counted_apart() -> None:
    document = rich(("base", "memit"))
    document["compositions"][1]["gates"][0] |= {"gate": "lost", "message": "is lost, as is known"}
    records = {record["id"]: typed_record(record) for record in document["compositions"]}
    suite = dict(run_properties(Collected(records=records), 0, "finished"))
    assert (suite["lmcompose.gates"], suite["lmcompose.gates.failed"], suite["lmcompose.gates.lost"]) == ("4", "0", "1")
    result = types.SimpleNamespace(
        composition=parse("memit"), state_hash=None, measurements=(), gates=records["memit"].gates
    )
    properties = dict(properties_of(cast(Result, result)))
    assert properties["lmcompose.gate.recall.lost"] == "lost: is lost, as is known"


def test_other_projects_get_no_property(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest_inprocess("--junitxml=junit.xml", "-pno:cacheprovider")
    assert "lmcompose" not in (pytester.path / "junit.xml").read_text()
