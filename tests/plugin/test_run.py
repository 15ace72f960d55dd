"""Whole runs on a random model: what the user sees, and what the report holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pytest_lmcompose.report.collect import SCHEMA_PATH
from tests.plugin.conftest import Project
from tests.plugin.tiny import zsre_records


def read_report(path: Path) -> dict[str, Any]:
    """Read a report and hold it to its schema."""
    report: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    jsonschema.validate(report, json.loads(SCHEMA_PATH.read_text()), jsonschema.Draft202012Validator)
    return report


def by_id(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in report["compositions"]}


def test_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA_PATH.read_text()))


def test_a_run_builds_measures_gates_and_reports(project: Project) -> None:
    ids = ("nudge", "nudge+round[digits=1]", "round[digits=1]+nudge")
    (project.path / "thresholds.yaml").write_text(
        "'*': {perplexity: {max_ratio_of_base: 100}}\nnudge: {edit_success_f1: {min: 1}}"
    )
    result = project.run(
        "--lmcompose-json=report.json",
        "--lmcompose-seed=7",
        "--lmcompose-set=evaluate.questions=true",
        "--junitxml=junit.xml",
        compose=ids,
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "nudge+round[[]digits=1[]]  step 2/2 round[[]digits=1[]]  * s  14 parameters changed",
            "*nudge  edit_success_f1 = * < min 1 (n = 3, standard error *)",
            "composition * perplexity*",
            "base *",
            "nudge *!*",
            "! a gate failed",
            "lmcompose report: *report.json",
        ]
    )
    # The second composition starts from the state that the first one left.
    assert "nudge+round[digits=1]  step 1/2" not in result.stdout.str()

    report = read_report(project.path / "report.json")
    assert (report["status"], report["seed"]) == ("finished", 7)
    records = by_id(report)
    assert set(records) == {"base", *ids}
    assert report["model"]["weight_hash"] == records["base"]["state_hash"]
    assert report["model"]["tokenisation"] == {"adds_bos": True, "start": ["<s>"], "end": []}
    assert len({record["state_hash"] for record in records.values()}) == 4
    long = records["nudge+round[digits=1]"]
    assert long["executed"] == long["requested"] == ["nudge", "round[digits=1]"]
    assert [step["settings"] for step in long["steps"]] == [{"scale": 0.01, "layers": [0]}, {"digits": 1}]
    assert long["steps"][0] == records["nudge"]["steps"][0]
    assert long["steps"][0]["changed"] == ["model.layers.0.mlp.down_proj.weight"]
    assert long["steps"][0]["details"] == {"edits": 3}
    assert long["steps"][1]["details"] == {"loss": None}
    assert long["steps"][1]["warnings"] == ["rounded to nearest"]
    metrics = {m["metric"]: m for m in long["measurements"]}
    assert {
        "edit_success_f1",
        "edit_locality_agreement",
        "recall",
        "recall_same_subject",
        "perplexity",
    } <= set(metrics)
    assert metrics["accuracy/harmless"]["n"] == 16
    assert metrics["accuracy/hazardous"]["higher_is_better"] is False
    assert all(len(m["samples"]) == m["n"] for m in metrics.values())
    base = {m["metric"]: m["value"] for m in records["base"]["measurements"]}
    assert base["edit_locality_agreement"] == 1.0  # compared with itself
    failed = [gate for gate in records["nudge"]["gates"] if not gate["passed"]]
    assert [(gate["metric"], gate["gate"], gate["threshold"]) for gate in failed] == [("edit_success_f1", "min", 1)]
    # Samples would swamp other reporters.
    assert "samples" not in (project.path / "junit.xml").read_text()


def test_a_step_that_changes_nothing_fails(project: Project) -> None:
    result = project.run("--lmcompose-json=report.json", compose=("idle", "nudge+refuse", "nudge"))
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["step 1, idle: idle changed no weight*"])
    result.stdout.fnmatch_lines(["step 2, refuse: layer 7 is missing; lower refuse.layers"])
    records = by_id(read_report(project.path / "report.json"))
    assert records["idle"]["status"] == "failed"
    assert "changed no weight" in records["idle"]["error"]
    assert records["nudge+refuse"]["executed"] == ["nudge"]
    assert records["nudge"]["status"] == "measured"


def test_ctrl_c_leaves_a_report_of_what_finished(project: Project) -> None:
    result = project.run("--lmcompose-json=report.json", compose=("nudge", "nudge+interrupt", "round"))
    assert result.ret == pytest.ExitCode.INTERRUPTED
    report = read_report(project.path / "report.json")
    records = by_id(report)
    assert report["status"] == "interrupted"
    assert records["nudge"]["status"] == "measured"
    assert records["nudge+interrupt"]["status"] == "interrupted"
    assert records["nudge+interrupt"]["executed"] == ["nudge"]
    assert "round" not in records


def test_an_edit_file_with_a_missing_field_names_it(project: Project, tiny_world: Path) -> None:
    records = zsre_records()
    del records[4]["rephrase"]
    (project.path / "zsre.json").write_text(json.dumps(records))
    result = project.run(f"--lmcompose-set=world.edits='{project.path}/zsre.json'", compose=("nudge",))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*zsre.json, record 5: field 'rephrase' is missing*"])


def test_fixtures_in_a_users_own_module(project: Project) -> None:
    project.pytester.makepyfile(
        test_inner="""
        import pytest

        @pytest.mark.parametrize("composition", ["nudge+round", "base"], indirect=True)
        def test_own(composition, intervened_model, base_model, measurements, gates):
            import torch
            from pytest_lmcompose.build.load import hash_weights
            assert gates  # they compare with the base model, and yet:
            assert hash_weights(intervened_model.model) == intervened_model.state_hash
            steps = [str(record.step) for record in intervened_model.steps]
            assert steps == [str(step) for step in composition.steps]
            ours, base = intervened_model.model, base_model.model
            assert ours is not base
            pairs = zip(ours.parameters(), base.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs) == (composition.id == "base")
            assert len(intervened_model.tokenizer("a b")["input_ids"]) > 1
            assert {m.metric for m in measurements} > {"recall", "perplexity"}
            with torch.no_grad():  # what a test does to the model is gone in the next
                for parameter in ours.parameters():
                    parameter.fill_(torch.nan)

        @pytest.mark.parametrize("composition", ["nudge"], indirect=True)
        def test_state(intervened_model):
            from pytest_lmcompose.build.load import hash_weights
            assert hash_weights(intervened_model.model) == intervened_model.state_hash
        """
    )
    project.run().assert_outcomes(passed=3)


def test_a_composition_without_any_gate_is_no_pass(project: Project) -> None:
    (project.path / "thresholds.yaml").write_text("memit: {recall: {min: 0.5}}")
    project.pytester.makepyfile(test_inner="from compositions.test_compositions import test_composition  # noqa: F401")
    result = project.run(compose=("nudge",))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no threshold applies to nudge*"])


@pytest.mark.parametrize(
    "workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["one process", "workers"]
)
def test_a_model_that_cannot_be_loaded_ends_the_run_at_once(
    project: Project, tiny_model: Path, workers: tuple[str, ...]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, project.path / "model"))
    found = load_file(folder / "model.safetensors")
    found.pop("model.norm.weight")
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    project.arguments[0] = f"--lmcompose-model={folder}"
    compose = ("nudge", *(f"nudge+round[digits={i}]" for i in range(1, 8)))
    result = (project.run_apart if workers else project.run)(*workers, compose=compose)
    assert result.ret not in (0, 1)
    text = result.stdout.str()
    assert "lacks model.norm.weight: weights and config.json do not match" in text
    assert "Traceback" not in text and "the model or the data cannot be used" in text
    assert 1 <= result.parseoutcomes()["errors"] <= (2 if workers else 1)


def test_a_folder_that_is_no_model_is_a_usage_error(project: Project, refused: Callable[..., str]) -> None:
    (project.path / "adapter").mkdir()
    (project.path / "adapter" / "adapter_config.json").write_text("{}")
    project.arguments[0] = f"--lmcompose-model={project.path / 'adapter'}"
    assert "has adapter_config.json but no adapter_model.safetensors" in refused(compose=("nudge",))
