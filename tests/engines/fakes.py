"""Engines that are not there: shell scripts in the place of an interpreter, and a driver of our own."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from interventions.compress.engines import run, table

SETTINGS = {
    "gptq": frozenset({"bits", "group_size"}),
    "awq": frozenset({"bits"}),
    "wanda": frozenset({"sparsity"}),
    "sparsegpt": frozenset({"sparsity"}),
}


def register_fake(monkeypatch: pytest.MonkeyPatch, *, package: str = "torch", own_environment: bool = False) -> None:
    """Make `fake` the only engine, one for every method; it is there if `package` is."""
    engine = table.Engine("fake", package, "fake-engine==1.0", SETTINGS, own_environment)
    monkeypatch.setattr(table, "ENGINES", (engine,))


def interpreter_that(folder: Path, script: str) -> str:
    """Write a shell script that stands where an engine's interpreter would, and return its path."""
    path = folder / "interpreter"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def interpreter_that_answers(folder: Path, weights: dict[str, Tensor], logits: Tensor) -> str:
    """Return an interpreter that gives this answer to any job."""
    answer = folder / "answer"
    answer.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, answer / "answer.safetensors")
    save_file({"logits": logits.contiguous()}, answer / "engine.safetensors")
    (answer / "answer.json").write_text(json.dumps({"versions": {"fake": "1.0"}, "engine_seconds": 0.5}))
    return interpreter_that(folder, f'cp "{answer}"/* .')


def install_driver(monkeypatch: pytest.MonkeyPatch, folder: Path, driver: str) -> None:
    """Put the source of a driver beside the real `job.py`, as the worker of the engine `fake`."""
    workers = folder / "engine_workers"
    shutil.copytree(run.WORKERS / "engine_workers", workers, ignore=shutil.ignore_patterns("__pycache__"))
    (workers / "fake.py").write_text(textwrap.dedent(driver))
    monkeypatch.setattr(run, "WORKERS", folder)
