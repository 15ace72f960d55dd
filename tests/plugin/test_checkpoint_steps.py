"""Checkpoints as steps of compositions: planned, built, cached by content and gated like any other step."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pytest_lmcompose.baseline.compare import circumstances
from pytest_lmcompose.baseline.storage import read_run
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.composition import parse
from tests.checkpoint_reading.folders import gptq_tensors, write
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_run import by_id, read_report

DOUBLE = """
import shutil, sys
from safetensors.numpy import load_file, save_file
open("runs", "a").write("x")
given, wanted = sys.argv[1:]
shutil.copytree(given, wanted)
tensors = load_file(f"{given}/model.safetensors")
tensors = {name: tensor * 2 if "mlp" in name else tensor for name, tensor in tensors.items()}
save_file(tensors, f"{wanted}/model.safetensors", {"format": "pt"})
"""
COMMAND = 'command[run="python double.py {input} {output}"]'
ALLOW = "--lmcompose-allow-commands"


@pytest.fixture
def steps(project: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a fine-tuned model, an adapter and a script beside its tests, and a cache."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    write_checkpoint(tiny_model, project.path / "sft", 0.01)
    write_adapter(tiny_model, project.path / "lora")
    (project.path / "double.py").write_text(DOUBLE)
    project.arguments[project.arguments.index(NO_CACHE)] = "--lmcompose-cache-dir=store"
    return project


def write_checkpoint(base: Path, folder: Path, scale: float) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale)
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)


def write_adapter(base: Path, folder: Path) -> None:
    import peft

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)


def ran(steps: Project, *arguments: str, compose: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    result = steps.run("--lmcompose-json=report.json", *arguments, compose=compose)
    assert result.ret == pytest.ExitCode.OK, result.stdout.str()
    return by_id(read_report(steps.path / "report.json"))


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_they_compose_with_other_steps_in_any_order(steps: Project, workers: tuple[str, ...]) -> None:
    ids = ("load[path=./sft]+round", "round+adapter[path=lora]", f"{COMMAND}+adapter[path=./lora,weight=0.5]")
    records = ran(steps, ALLOW, *workers, compose=ids)
    for name in ids:
        assert records[name]["status"] == "measured", records[name]
        assert records[name]["executed"] == [str(step) for step in parse(name).steps]
    load = records["load[path=./sft]+round"]["steps"][0]
    assert (load["category"], load["settings"]["path"], load["details"]["path"]) == ("checkpoint", "./sft", "./sft")
    if not workers:
        half = ran(steps, compose=("load[path=sft]",))["load[path=sft]"]
        model: Any = AutoModelForCausalLM.from_pretrained(steps.path / "sft", dtype=torch.float32)
        assert half["state_hash"] == hash_weights(model)


def test_selection_by_k_and_by_category(steps: Project) -> None:
    ids = ("base", "load[path=./sft]", "load[path=./sft]+round", "round")
    steps.run("--collect-only", "-q", "-k", "load and round", compose=ids).stdout.fnmatch_lines(
        ["*test_it[[]load[[]path=./sft]+round]", "*1/4 tests collected*"]
    )
    steps.run("--collect-only", "-q", "-m", "checkpoint and not compress", compose=ids).stdout.fnmatch_lines(
        ["*test_it[[]load[[]path=./sft]]", "*1/4 tests collected*"]
    )


def test_states_are_cached_by_the_content_of_what_they_read(steps: Project, tiny_model: Path) -> None:
    ids = ("load[path=./sft]+round", "adapter[path=lora]", COMMAND)

    def applied(*arguments: str) -> str:
        result = steps.run(ALLOW, *arguments, compose=ids)
        assert result.ret == pytest.ExitCode.OK
        return "\n".join(line for line in result.stdout.lines if " s  " in line and "changed" in line)

    assert applied("--lmcompose-json=before.json").count("changed") == 4
    assert applied() == "" and (steps.path / "runs").read_text() == "x"
    (steps.path / "sft" / "README.md").write_text("A card.")
    (steps.path / "sft" / "checkpoint-5").mkdir()
    assert applied() == ""
    write_checkpoint(tiny_model, steps.path / "sft", 0.02)
    (steps.path / "double.py").write_text(f"{DOUBLE}\n# another one")
    again = applied("--lmcompose-json=after.json")
    assert again.count("changed") == 3 and "adapter" not in again
    assert (steps.path / "runs").read_text() == "xx"
    before, after = (read_run(steps.path / f"{name}.json") for name in ("before", "after"))
    found = [difference.message for difference in circumstances(before, after) if difference.what == "settings"]
    text = "\n".join(found)
    assert "load[path=./sft]: content: " in text and f"{COMMAND}: content: " in text and "adapter" not in text


def test_the_same_composition_elsewhere_shares_the_cache(
    steps: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"--lmcompose-cache-dir={tmp_path / 'store'}"
    assert steps.run(store, compose=("load[path=./sft]",)).ret == pytest.ExitCode.OK
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(steps.path, elsewhere)
    shutil.rmtree(steps.path / "sft")
    monkeypatch.chdir(elsewhere)
    result = steps.run(store, compose=("load[path=./sft]",))
    assert result.ret == pytest.ExitCode.OK and "parameters changed" not in result.stdout.str()


def test_a_plan_needs_no_work(steps: Project) -> None:
    result = steps.run("--lmcompose-plan", ALLOW, compose=("load[path=./sft]+round", COMMAND))
    result.stdout.fnmatch_lines(["2 compositions: 3 steps to apply*", "*load[[]path=./sft]*"])
    assert not (steps.path / "runs").exists()


def broken_shard(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[0].unlink()


def other_vocabulary(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken_shard, "is missing, but model.safetensors.index.json lists it"),
        (other_vocabulary, "of width 32, vocabulary of *, but the model is a * vocabulary of "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (shutil.rmtree, "path=./sft: no such folder: "),
    ],
)
def test_unusable_checkpoints_are_usage_errors(
    change: Callable[[Path], None], message: str, steps: Project, refused: Callable[..., str]
) -> None:
    change(steps.path / "sft")
    text = refused(compose=("round+load[path=./sft]",))
    assert text.startswith("ERROR: lmcompose: load[path=./sft]: ") and len(text.splitlines()) == 1, text
    for part in message.split("*"):
        assert part in text


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("load", "load: path is empty: name a folder or a hub id, as in [path=./checkpoint]"),
        ("round+adapter", "adapter: path is empty"),
        (
            "adapter[path=./sft]",
            "no PEFT adapter: *adapter_config.json is missing; for the weights of a model use load",
        ),
        ("adapter[path=./none]", "path=./none: no such folder: "),
        (COMMAND, f"{COMMAND} runs a command of yours: permit it with {ALLOW}"),
        ("load[pth=./sft]", "Did you mean path"),
        ("load[path=./sft,only=[]]", "load.only"),
    ],
)
def test_steps_that_cannot_start_are_usage_errors(
    step: str, message: str, steps: Project, refused: Callable[..., str]
) -> None:
    text = refused(compose=("base", step))
    for part in message.split("*"):
        assert part in text
    assert "Traceback" not in text and not (steps.path / "runs").exists()


def test_no_file_permits_commands(steps: Project, refused: Callable[..., str]) -> None:
    (steps.path / "pytest.ini").write_text("[pytest]\nlmcompose_allow_commands = true\n")
    assert "permit it with --lmcompose-allow-commands" in refused(compose=(COMMAND,))
    (steps.path / "thresholds.yaml").write_text(f"round: {{perplexity: {{max_rise: {{of: '{COMMAND}', value: 9}}}}}}\n")
    assert f"thresholds.yaml: {COMMAND} runs a command of yours" in refused(compose=("round",))
    assert "runs a command of yours" in refused(
        "--lmcompose-set=suite.compositions=['command']", "--lmcompose-suite=single"
    )


def test_a_preset_file_may_name_checkpoints_beside_it(steps: Project) -> None:
    elsewhere = steps.path / "presets"
    elsewhere.mkdir()
    shutil.move(steps.path / "sft", elsewhere / "sft")
    (elsewhere / "own.yaml").write_text("# @package _global_\nsuite: {compositions: [load]}\nload: {path: ./sft}\n")
    records = ran(steps, "--lmcompose-suite=presets/own.yaml", compose=())
    assert records["load"]["status"] == "measured"


def test_paths_in_ids_are_read_as_they_are_written(steps: Project) -> None:
    paths = (
        "./a+b",
        "'./with space, comma'",
        "'./b[0]'",
        "./awq-out",
        "'./é'",
        r"'./it\'s'",
        '"./{x}"',
        "org/model.v2",
    )
    found = {}
    for path in paths:
        composition = parse(f"load[path={path}]+round")
        assert parse(composition.id) == composition and len(composition.steps) == 2
        name = path.strip("'\"").replace(r"\'", "'")
        shutil.copytree(steps.path / "sft", steps.path / name)
        found[composition.id] = name
    records = ran(steps, "--lmcompose-set=evaluate.editing=false", compose=tuple(found))
    assert {name: records[name]["steps"][0]["settings"]["path"] for name in found} == found


def test_a_failing_command_says_so(steps: Project) -> None:
    result = steps.run(ALLOW, compose=('command[run="echo no luck; exit 7"]',))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*command: failed (exit code 7); its last output:*", "*no luck*"])


def test_grids_that_steps_read_count_also_from_the_cache(steps: Project, tiny_model: Path) -> None:
    """Those in the order of activations cannot be seen from values."""
    config = AutoConfig.from_pretrained(tiny_model)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
    packed = steps.path / "packed"
    write(packed, config, settings, lambda layer: gptq_tensors(layer, 4, less_one=True), act_order=True)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, packed)
    copy = "command[run='cp -r packed {output}']"
    expected = {"load[path=./packed]": 4.0, copy: 4.0, "rtn[bits=8]+load[path=packed]": 4.0}
    expected |= {"load[path=packed]+rtn[bits=8]": 8.0, f"{copy}+load[path=./sft]": 32.0}
    sizes = "--lmcompose-set=evaluate.efficiency=true", "--lmcompose-set=evaluate.editing=false"
    for length in (16, 17):  # the second run reads the states, and measures again
        length_too = f"--lmcompose-set=evaluate.latency_length={length}"
        result = steps.run(*sizes, length_too, ALLOW, "-v", "--lmcompose-json=report.json", compose=tuple(expected))
        assert ("parameters changed" in result.stdout.str()) == (length == 16)
        records = by_id(read_report(steps.path / "report.json"))
        found = {n: {m["metric"]: m["value"] for m in records[n]["measurements"]}["average_bits"] for n in expected}
        assert found == expected
