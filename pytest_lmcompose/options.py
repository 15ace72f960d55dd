"""Command-line flags and ini values of the plugin, read into one frozen `Options`."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SUITE_FOLDER = Path(__file__).resolve().parent.parent / "compositions"
"""The installed suite: its recipes, thresholds and embedded world. Found beside the plugin, since a
project under test may have a folder of that name too."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class Options:
    """What the user asked for; a flag wins over its ini value."""

    model: str | None
    suite: str | None
    compose: tuple[str, ...]
    overrides: tuple[str, ...]
    thresholds: Path
    seed: int
    device: str
    json: Path | None
    folder: Path
    """Where pytest was called: relative paths count from here."""
    given: bool
    """Whether anything was set: then the recipe is checked before collection."""


def add_options(parser: pytest.Parser) -> None:
    """Define the flags, and an ini value of the same name for each."""
    group = parser.getgroup("lmcompose", "lmcompose: models that several interventions change in sequence")

    def add(name: str, help: str, metavar: str, ini: Any = "string", **kwargs: Any) -> None:
        group.addoption(f"--lmcompose-{name}", dest=f"lmcompose_{name}", help=help, metavar=metavar, **kwargs)
        ini_help = f"{help} (default of --lmcompose-{name})"
        parser.addini(f"lmcompose_{name}", ini_help, type=ini, default=[] if ini == "linelist" else "")

    add("model", "preset of conf/model, folder with config.json, or hub id (default: tinyworld)", "MODEL")
    add("suite", "suite of conf/suite whose compositions are tested (default: main)", "NAME")
    add(
        "compose",
        "test this composition, e.g. 'awq[bits=3]+memit', in place of the suite's (repeatable)",
        "ID",
        "linelist",
        action="append",
    )
    add(
        "set",
        "override a recipe key in Hydra's grammar, e.g. memit.layers=[2,3] (repeatable)",
        "KEY=VALUE",
        "linelist",
        action="append",
    )
    add("thresholds", "YAML file of thresholds (default: the suite's thresholds.yaml)", "PATH")
    add("seed", "seed of the run, from which all others follow (default: 0)", "N")
    add("device", "auto, cpu, cuda, cuda:1, ... (default: auto)", "DEVICE")
    add("json", "write the report, one JSON document, to this file", "PATH")


def read_options(config: pytest.Config) -> Options:
    """Read the options of `config`.

    Raises pytest.UsageError for a seed, device or path that cannot be used.
    """
    values = {name: _value(config, name) for name in ("model", "suite", "thresholds", "seed", "device", "json")}
    compose, overrides = _values(config, "compose"), _values(config, "set")
    folder = config.invocation_params.dir
    thresholds = folder / values["thresholds"] if values["thresholds"] else SUITE_FOLDER / "thresholds.yaml"
    if not thresholds.is_file():
        raise pytest.UsageError(f"--lmcompose-thresholds: no such file: {thresholds}")
    seed = values["seed"] or "0"
    if not re.fullmatch(r"\d{1,18}", seed):
        raise pytest.UsageError(f"--lmcompose-seed: expected a whole number from 0 up, not {seed!r}")
    device = values["device"] or "auto"
    if not _DEVICE.fullmatch(device):
        raise pytest.UsageError(f"--lmcompose-device: expected auto, cpu, mps, cuda or cuda:N, not {device!r}")
    return Options(
        model=values["model"],
        suite=values["suite"],
        compose=compose,
        overrides=overrides,
        thresholds=thresholds,
        seed=int(seed),
        device=device,
        json=folder / values["json"] if values["json"] else None,
        folder=folder,
        given=any(values.values()) or bool(compose or overrides),
    )


def check_writable(path: Path) -> None:
    """Make sure that the report can be written, by making and removing a file beside it.

    Raises pytest.UsageError that says what is in the way.
    """
    flag = f"--lmcompose-json={path}"
    if path.is_dir():
        raise pytest.UsageError(f"{flag}: this is a folder; name a file in it")
    if not path.parent.is_dir():
        raise pytest.UsageError(f"{flag}: the folder {path.parent} does not exist; make it first")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise pytest.UsageError(f"{flag}: cannot write in {path.parent}: {error.strerror}") from None


def _value(config: pytest.Config, name: str) -> str | None:
    flag: str | None = config.getoption(f"lmcompose_{name}")
    return flag if flag is not None else str(config.getini(f"lmcompose_{name}")) or None


def _values(config: pytest.Config, name: str) -> tuple[str, ...]:
    flags: list[str] | None = config.getoption(f"lmcompose_{name}")
    ini: list[str] = config.getini(f"lmcompose_{name}")
    # Overrides add up, the flag's last, so that it wins; compositions on the command line replace.
    return (*ini, *(flags or ())) if name == "set" else tuple(flags or ini)
