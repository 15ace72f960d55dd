"""The step `command`: what a user's command gets, what it may write, and how it may fail."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from interventions import InterventionError, apply
from interventions.checkpoint.command import CommandSettings
from tests.interventions.test_load import equal, weights
from tests.models import tiny_model, tiny_tokenizer

SCRIPT = """
import json, os, shutil, sys
from safetensors.numpy import load_file, save_file
given, wanted = sys.argv[1:3]
assert (given, wanted) == (os.environ["LMCOMPOSE_INPUT"], os.environ["LMCOMPOSE_OUTPUT"])
assert int(os.environ["LMCOMPOSE_SEED"]) == 3 and not any(name.startswith("PYTEST_") for name in os.environ)
shutil.copytree(given, wanted)
tensors = load_file(given + "/model.safetensors")
tensors = {name: tensor * 2 if "mlp" in name else tensor for name, tensor in tensors.items()}
save_file(tensors, wanted + "/model.safetensors", {"format": "pt"})
"""
PYTHON = sys.executable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "a folder's"
    place.mkdir()
    (place / "double.py").write_text(SCRIPT)
    (place / "scratch").mkdir()
    return place


def run(model: Any, folder: Path, command: str, **settings: Any) -> Any:
    """Apply the step; nothing may be left of its temporary folders."""
    try:
        return apply(
            model, tiny_tokenizer(), "command", run=command, scratch="scratch", folder=folder, seed=3, **settings
        )
    finally:
        assert not list((folder / "scratch").iterdir())


def test_what_the_command_writes_becomes_the_model(folder: Path) -> None:
    model = tiny_model()
    before = weights(model)
    report = run(model, folder, f"{PYTHON} double.py {{input}} {{output}} && echo done")
    assert equal(weights(model), {name: w * 2 if "mlp" in name else w for name, w in before.items()})
    assert all("mlp" in name for name in report.changed)


def test_an_adapter_that_it_writes_is_merged(folder: Path, tmp_path: Path) -> None:
    import peft

    from tests.interventions.test_adapter import moved

    model, other = tiny_model(), tiny_model()
    moved(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")
    run(model, folder, "cp -r ../lora {output}")
    apply(other, None, "adapter", path=str(tmp_path / "lora"))
    assert equal(weights(model), weights(other))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (" ", "command: run is empty"),
        ("true", r"it wrote nothing to \{output\}, but not a model's folder"),
        ('mkdir "$LMCOMPOSE_OUTPUT"; touch {output}/notes', r"it wrote only notes to \{output\}"),
        ("cp -r {input} {output}", "the output of the command holds the weights that the model has already"),
        ("cp -r other {output}", "the output of the command has model.layers.0.mlp.gate_proj.weight of shape"),
        ("cp -r {input} {output}; rm {output}/model.safetensors", "the output of the command: .* has no weights"),
        ("echo one; echo two >&2; exit 3", r"failed \(exit code 3\); its last output:\none\ntwo$"),
        ("no-such-program {input}", r"failed \(exit code 127\).*\n.*not found"),
        ("kill -9 $$", r"ended by SIGKILL\); its last output:\n\(none\)"),
        ("seq 100000", "it wrote nothing"),
        ("seq 100; false", r"exit code 1\); its last output:\n89\n"),
        ("echo 'unfinished", "failed"),
    ],
)
def test_failures_say_why_and_leave_the_model(command: str, message: str, folder: Path) -> None:
    import transformers

    from tests.models import CONFIGS

    wide = CONFIGS["llama"]().to_dict() | {"intermediate_size": 64}
    tiny_model(transformers.LlamaConfig(**wide)).save_pretrained(folder / "other")
    model = tiny_model()
    before = weights(model)
    with pytest.raises(InterventionError, match=message):
        run(model, folder, command)
    assert equal(weights(model), before)


def test_a_timeout_ends_the_command_and_its_children(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(InterventionError, match=r"stopped after timeout=0.5 seconds; its last output:\nhere"):
        run(tiny_model(), folder, "echo here; sh -c 'sleep 60 & echo $! > child; wait'", timeout=0.5)
    assert time.monotonic() - started < 30
    child = int((folder / "child").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("the command's child runs on")


def test_a_disk_without_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        InterventionError, match=r"0.0 GiB of free space.*set command.scratch to a folder on another disk"
    ):
        run(tiny_model(), folder, "true")


def test_a_disk_that_fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(InterventionError, match=r"the model cannot be saved: OSError: \[Errno 28\] No space left"):
        run(model, folder, "true")


def test_its_identity_is_the_command_and_the_files_that_it_names(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "part").write_text("1")
    (folder / "own.yaml").write_text("bits: 4")
    settings = CommandSettings(run="python double.py --config=own.yaml;ls", reads=["data"])
    seen = [settings.identity(folder)]
    assert CommandSettings(run=settings.run, reads=["data"], timeout=5, scratch="scratch").identity(folder) == seen[0]
    for name in ("double.py", "own.yaml", "data/part"):
        with (folder / name).open("a") as stream:
            stream.write("\n")
        seen.append(settings.identity(folder))
    seen.append(CommandSettings(run="python double.py", reads=["data"]).identity(folder))
    assert len({str(one) for one in seen}) == len(seen)


def test_settings(folder: Path) -> None:
    for settings, message in (
        ({"reads": ["gone"]}, "reads=gone: no such file or folder"),
        ({"scratch": "gone"}, "scratch=gone: no such folder"),
    ):
        with pytest.raises(InterventionError, match=message):
            apply(tiny_model(), None, "command", run="true", folder=folder, **settings)
    assert torch.is_grad_enabled()
