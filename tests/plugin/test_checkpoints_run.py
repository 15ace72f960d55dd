"""Exports of runs, and the commands `lmcompose build`, `verify` and `gate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result

from interventions import apply
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.checkpoints.card import Card, read_card, update_card
from pytest_lmcompose.cli import main
from pytest_lmcompose.results import decode, replace
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_run import by_id, read_report

FAILING = "nudge[scale=0.1]"
IDS = ("base", "nudge", f"{FAILING}+round")
FOLDERS = {"nudge": "nudge", f"{FAILING}+round": "nudge-scale=0.1+round-"}
THRESHOLDS = "'*': {perplexity: {max_ratio_of_base: 100}}\n'*+round': {edit_success_f1: {min: 1}}\n"


class Exported(NamedTuple):
    """A run, its records and the folders of its compositions."""

    project: Project
    records: dict[str, Any]
    folders: dict[str, Path]


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def card_of(folder: Path, composition: str) -> Card:
    """Return the card of a folder, and check that the model card agrees."""
    card = read_card(folder)
    assert card is not None and card.composition == composition
    head, text = (folder / "README.md").read_text().split("---\n", 2)[1:]
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert f"`{composition}`" in text and card.state_hash in text
    return card


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the only run of `exported` is kept."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def exported(project: Project, kept: Path) -> Exported:
    """A finished run with a report and exported folders."""
    report = project.path / "report.json"
    if not (kept / "report.json").exists():
        (project.path / "thresholds.yaml").write_text(THRESHOLDS)
        result = project.run("--lmcompose-export=out", "--lmcompose-json=report.json", compose=IDS[1:])
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines([f"lmcompose export: {project.path}/out/nudge"])
        shutil.copytree(project.path / "out", kept / "out")
        (kept / "report.json").write_text(report.read_text().replace(str(project.path), "HERE"))
    else:
        shutil.copytree(kept / "out", project.path / "out")
        report.write_text((kept / "report.json").read_text().replace("HERE", str(project.path)))
    records = by_id(read_report(report))
    return Exported(project, records, {name: Path(records[name]["export"]["folder"]) for name in IDS[1:]})


def test_a_run_exports_each_composition_with_its_verdict(
    exported: Exported,
) -> None:
    project, records, folders = exported
    assert {path.name for path in (project.path / "out").iterdir()} == {path.name for path in folders.values()}
    for name, folder in folders.items():
        assert folder.name.startswith(FOLDERS[name])
        record, card = records[name], card_of(folder, name)
        assert card.state_hash == card.weights_hash == record["state_hash"] == record["export"]["weights_hash"]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert hash_weights(model) == record["state_hash"]
        assert [step.id for step in card.steps] == record["executed"]
        assert [step.seed for step in card.steps] == [step["seed"] for step in record["steps"]]
        assert [step.settings for step in card.steps] == [step["settings"] for step in record["steps"]]
        assert card.data == record["data"] and card.model.weight_hash != card.state_hash
        assert [(m.metric, m.value, m.stderr) for m in card.measurements] == [
            (m["metric"], m["value"], m["stderr"]) for m in record["measurements"]
        ]
        assert [(g.metric, g.passed) for g in card.gates] == [(g["metric"], g["passed"]) for g in record["gates"]]
        assert card.environment.packages["transformers"] == transformers.__version__
    failing = folders[IDS[2]] / "README.md"
    assert "1 of 2 failed" in failing.read_text() and "edit\\_success\\_f1 = " in failing.read_text()
    assert "all 1 passed" in (folders["nudge"] / "README.md").read_text()
    # The base model is the reference of gates, but nobody wants a copy of it.
    assert "export" not in records["base"]


def test_verify_knows_each_folder_and_every_changed_bit(exported: Exported, tiny_model: Path) -> None:
    project, records, folders = exported
    report = str(project.path / "report.json")
    for name, gates in ((IDS[1], "all gates passed"), (IDS[2], "1 of 2 gates failed")):
        found = call("verify", str(folders[name]), report)
        digest = records[name]["state_hash"][:12]
        assert found.output == f"{folders[name]} is {name} ({gates}) of {report}, weights {digest}\n"
        assert found.exit_code == 0
    found = call("verify", str(tiny_model), report)
    assert found.exit_code == 0 and "is base (not judged) of" in found.output
    folder = folders["nudge"]
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            found = call("verify", str(folder), report)
            assert found.exit_code == 1 and found.output.count("\n") == 1, (path.name, place, found.output)
            assert "was changed after it was written" in found.output
        path.unlink()
        assert call("verify", str(folder), report).exit_code == 1 or path.name == "lmcompose.json"
        path.write_bytes(whole)
    (folder / "model.py").touch()
    assert "model.py was added" in call("verify", str(folder), report).output
    (folder / "model.py").unlink()
    (folder / ".gitattributes").touch()
    assert call("verify", str(folder), report).exit_code == 0


def test_verify_needs_no_card(exported: Exported) -> None:
    """The report's own hashes of the files show a change; weights alone are recognised too."""
    project, _, folders = exported
    report, folder = project.path / "report.json", folders["nudge"]
    (folder / "lmcompose.json").unlink()
    assert call("verify", str(folder), str(report)).exit_code == 0
    config = folder / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"num_beams": 2,', 1))
    found = call("verify", str(folder), str(report))
    assert found.exit_code == 1 and "generation_config.json differs" in found.output
    document = json.loads(report.read_text())
    for record in document["compositions"]:
        record.pop("export", None)
    report.write_text(json.dumps(document))
    found = call("verify", str(folder), str(report))
    assert found.exit_code == 0 and "config and tokenizer cannot be checked" in found.output
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    model.save_pretrained(folder)
    found = call("verify", str(folder), str(report))
    assert found.exit_code == 1 and "is no composition of" in found.output


def test_verify_says_what_it_cannot_read(exported: Exported) -> None:
    project, _, folders = exported
    report, here = str(project.path / "report.json"), project.path
    (here / "empty").mkdir()
    for words, message in (
        ((str(here / "none"), report), "is not a folder"),
        ((str(here / "empty"), report), "has no config.json"),
        ((str(folders["nudge"]), str(here / "none.json")), "no stored run"),
        ((str(folders["nudge"]), str(folders["nudge"] / "config.json")), "is not a pytest-lmcompose report"),
    ):
        found = call("verify", *words)
        assert found.exit_code == 2 and message in found.output and found.output.count("\n") == 1


def test_the_card_gets_the_final_verdict(exported: Exported) -> None:
    project, _, folders = exported
    record = decode((project.path / "report.json").read_bytes()).by_id["nudge"]
    before = (folders["nudge"] / "lmcompose.json").read_bytes()
    update_card(record)
    assert (folders["nudge"] / "lmcompose.json").read_bytes() == before
    assert record.export is not None
    elsewhere = replace(record.export, weights_hash="0" * 64)
    update_card(replace(record, gates=(), export=elsewhere))  # another run has replaced the folder
    assert (folders["nudge"] / "lmcompose.json").read_bytes() == before
    late = tuple(replace(gate, passed=False, message="failed late") for gate in record.gates)
    update_card(replace(record, gates=late))
    card = card_of(folders["nudge"], "nudge")
    assert card.failed == late and "failed late" in (folders["nudge"] / "README.md").read_text()
    assert call("verify", str(folders["nudge"]), str(project.path / "report.json")).exit_code == 0


@pytest.mark.slow
def test_workers_export_what_they_test(project: Project) -> None:
    result = project.run_apart("-n1", "--lmcompose-export=out", "--lmcompose-json=report.json", compose=IDS)
    result.assert_outcomes(passed=3)
    records = by_id(read_report(project.path / "report.json"))
    for name in IDS:  # the base model was asked for
        card = card_of(Path(records[name]["export"]["folder"]), name)
        assert card.state_hash == (records[name]["state_hash"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lmcompose-export=thresholds.yaml",), "thresholds.yaml"),
        (("--lmcompose-export=out", "--lmcompose-export-format=gguf"), "expected plain, compressed-tensors, gptq"),
        (("--lmcompose-export-format=awq",), "requires --lmcompose-export=DIR"),
        (("--lmcompose-export={model}/out",), "is the folder of the model"),
        (("--lmcompose-export=exported",), "is itself an exported model"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(
    project: Project, tiny_model: Path, arguments: tuple[str, ...], message: str
) -> None:
    taken = project.path / "exported"
    taken.mkdir()
    (taken / "lmcompose.json").write_text('{"card_version": 1}')
    result = project.run(*(text.format(model=tiny_model) for text in arguments), compose=("nudge",))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str() and "Traceback" not in result.stderr.str()


def test_a_folder_that_cannot_be_written_fails_its_test_in_one_line(project: Project) -> None:
    taken = project.path / "out" / "nudge"
    taken.mkdir(parents=True)
    (taken / "theirs").touch()
    result = project.run("--lmcompose-export=out", "--lmcompose-json=report.json", compose=("nudge", "round"))
    result.assert_outcomes(passed=2, errors=1)
    assert "was not written by lmcompose" in result.stdout.str() and "Traceback" not in result.stdout.str()
    assert [path.name for path in taken.iterdir()] == ["theirs"]
    records = by_id(read_report(project.path / "report.json"))
    assert "export" not in records["nudge"] and records["nudge"]["status"] == "measured"
    assert (project.path / "out" / "round" / "config.json").is_file()


def building(project: Project, *words: str) -> Result:
    """Run `lmcompose build` in the project's folder, in this process, which knows the stubs."""
    (project.path / "conftest.py").unlink(missing_ok=True)
    given = [text for text in project.arguments if text != NO_CACHE]
    return call("build", *given, *words)


def test_build_writes_one_folder_from_the_cache_of_earlier_runs(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.path)
    project.arguments[project.arguments.index(NO_CACHE)] = "--lmcompose-cache-dir=store"
    project.run(compose=("nudge",)).assert_outcomes(passed=1)
    built = building(project, "nudge+round", "-o", "new/folder", "--no-measure")
    assert built.exit_code == 0
    assert "nudge  read from the cache" in built.output and "step 1/2" not in built.output
    card = card_of(project.path / "new" / "folder", "nudge+round")
    assert card.measurements == () and "not measured" in (project.path / "new" / "folder" / "README.md").read_text()
    # The same again, measured; a gate fails, and the folder is replaced.
    (project.path / "thresholds.yaml").write_text("'*': {edit_success_f1: {min: 1}}")
    built = building(project, "nudge+round", "--output=new/folder", "--json=report.json")
    assert built.exit_code == 1 and "read from the cache" in built.output
    assert len(card_of(project.path / "new" / "folder", "nudge+round").failed) == 1
    assert call("verify", str(project.path / "new" / "folder"), str(project.path / "report.json")).exit_code == 0


def test_build_refuses_before_any_work(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path)
    refused = building(project, "nudge+round", "-o", ".", "--no-measure")
    assert refused.exit_code == 2 and "was not written by lmcompose" in refused.output
    assert "test session starts" not in refused.output
    assert call("build", "nudge", "-o", "out", "--format=gguf").exit_code == 2
    assert "'-o'" in call("build", "nudge").output


# lmcompose gate


def gating(project: Project, *words: str) -> Result:
    return call("gate", *words, "--baseline", str(project.path / "report.json"))


def test_gate_judges_a_folder_like_the_composition_that_it_is(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, records, folders = exported
    monkeypatch.chdir(project.path)
    found = gating(project, str(folders[IDS[2]]), "--as", IDS[2])
    assert found.exit_code == 1, found.output
    for gate in records[IDS[2]]["gates"]:
        assert gate["passed"] or f"failed: {gate['message']}" in found.output
    assert f"{folders[IDS[2]]}: 1 of 2 gates failed" in found.output
    assert [line.split()[0] for line in found.output.splitlines() if line.startswith(("base ", "nudge["))]
    # Nobody says what it is: the rules for every composition apply.
    found = gating(project, str(folders[IDS[2]]))
    assert found.exit_code == 0 and "0 of 1 gate failed" in found.output
    strict = project.path / "strict.yaml"
    strict.write_text("'*': {perplexity: {max_ratio_of_base: 1}, recall: {max_loss: {value: 1, of: baseline}}}")
    worse = next(m["value"] for m in records[IDS[2]]["measurements"] if m["metric"] == "perplexity")
    base = next(m["value"] for m in records["base"]["measurements"] if m["metric"] == "perplexity")
    found = gating(project, str(folders[IDS[2]]), "--thresholds=strict.yaml")
    assert ("perplexity = " in found.output) == (worse > base)  # not compared with itself
    assert found.exit_code == 1 and "name it with --as" in found.output


def test_gate_compares_with_the_answers_of_the_base_model(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own answers would always agree with themselves."""
    project, records, folders = exported
    monkeypatch.chdir(project.path)
    limits = {"edit_locality_agreement": "min: 1", "top1_agreement": "min: 1", "kl_to_base": "max: 0"}
    limits |= {"flips/recall": "min: 1"}
    rules = ", ".join(f"{metric}: {{{limit}}}" for metric, limit in limits.items())
    (project.path / "strict.yaml").write_text(f"'*': {{{rules}}}")
    measured = {m["metric"]: m["value"] for m in records[IDS[2]]["measurements"]}
    assert measured["edit_locality_agreement"] < 1 and measured["top1_agreement"] < 1 and measured["kl_to_base"] > 0
    found = gating(project, str(folders[IDS[2]]), "--thresholds=strict.yaml")
    assert found.exit_code == 1
    for metric, limit in limits.items():
        sign = "<" if "min" in limit else ">"
        text = f"{metric} = {measured[metric]:.6g} {sign} {limit.replace(':', '')}"
        assert text in found.output, found.output


def test_gate_says_what_it_cannot_compare(exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project, _, folders = exported
    monkeypatch.chdir(project.path)
    other = tmp_path / "other"
    shutil.copytree(folders["nudge"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for words, message in (
        ((str(other),), "cannot be compared with"),
        ((str(project.path / "none"),), "none"),
        ((str(folders["nudge"]), "--as=nugde"), "nudge"),
        ((str(folders["nudge"]), "--as=nudge", "--set=evaluate.editz=3"), "editz"),
    ):
        found = gating(project, *words)
        assert found.exit_code == 2 and message in found.output, found.output
        assert "Traceback" not in found.output
    assert call("gate", str(other), "--baseline=none.json").exit_code == 2
    for flag in ("--model=gpt2", "--json=out.json", "--suite=main"):
        assert "No such option" in gating(project, str(folders["nudge"]), flag).output  # it would have no effect
    document = json.loads((project.path / "report.json").read_text())
    document["compositions"] = [record for record in document["compositions"] if record["id"] != "base"]
    (project.path / "report.json").write_text(msgspec.json.encode(document).decode())
    found = gating(project, str(folders["nudge"]))
    assert found.exit_code == 2 and "no measurements of the base model" in found.output


@pytest.mark.parametrize("workers", [(), pytest.param(("-n1",), marks=pytest.mark.slow)])
def test_what_cannot_be_packed_is_refused_before_it_is_built(workers: tuple[str, ...], project: Project) -> None:
    packed = ("--lmcompose-export=out", "--lmcompose-export-format=compressed-tensors", "-v", *workers)
    ids = ("magnitude", "rtn[bits=4,group_size=32]")
    result = project.run(*packed, compose=ids)
    text = result.stdout.str() + result.stderr.str()
    assert "compressed-tensors: nothing of magnitude can be packed: none of its steps quantises" in text
    assert "step 1/1 magnitude" not in text and "Traceback" not in text
    if workers:
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        assert [path.name[:3] for path in (project.path / "out").iterdir()] == ["rtn"]
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR and not (project.path / "out").exists()
        assert project.run(*packed, "-k", "rtn", compose=ids).ret == pytest.ExitCode.OK
        named = project.run("--lmcompose-export=out", "--lmcompose-export-format=awq", compose=("base", ids[1]))
        assert named.ret == pytest.ExitCode.USAGE_ERROR


def test_a_plain_model_on_a_grid_can_be_packed_without_a_step(project: Project, tiny_model: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    apply(model, None, "rtn", bits=4, group_size=32)
    model.save_pretrained(project.path / "grid")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, project.path / "grid")
    model_and_export = ("--lmcompose-model=grid", "--lmcompose-export=out", "--lmcompose-export-format=gptq")
    project.run(*model_and_export, compose=("base", "magnitude"))
    card_of(project.path / "out" / "base", "base")


def test_a_quantiser_with_exceptions_is_not_taken_for_one_that_packs_nothing(project: Project) -> None:
    packed = ("--lmcompose-export=out", "--lmcompose-export-format=compressed-tensors")
    result = project.run(*packed, compose=("rtn[bits=4,group_size=32,keep=[first:16]]",))
    assert "nothing of" not in result.stdout.str() + result.stderr.str()
    assert [path.name[:3] for path in (project.path / "out").iterdir()] == ["rtn"]
