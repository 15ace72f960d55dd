"""Whether a device that the user named is here. Imports no torch: a process of its own asks it, unless it is here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

from pytest_lmcompose.recipe import RecipeError

_PATIENCE = 300.0
"""Seconds for an import of torch from a slow disk, and for a driver that has to wake up."""
_ASK = "import json; from pytest_lmcompose.devices import found; print(json.dumps(found()))"


class Devices(NamedTuple):
    """What torch finds on this machine."""

    cuda: int
    mps: bool


def check_device(name: str) -> None:
    """Raise RecipeError if torch finds no device `name` on this machine; `auto` and `cpu` need no look."""
    if name in ("auto", "cpu"):
        return
    problem = device_problem(name, found() if "torch" in sys.modules else _ask())
    if problem is not None:
        raise RecipeError(problem)


def device_problem(name: str, devices: Devices) -> str | None:
    """Return what is wrong with the device `name` where there are `devices`, None for nothing."""
    if name == "mps" and not devices.mps:
        return "--lmcompose-device=mps: torch finds no MPS device here; use auto or cpu"
    if not name.startswith("cuda"):
        return None
    if not devices.cuda:
        return f"--lmcompose-device={name}: torch finds no CUDA device here; use auto or cpu"
    if int(name.partition(":")[2] or 0) >= devices.cuda:
        known = ", ".join(f"cuda:{number}" for number in range(devices.cuda))
        return f"--lmcompose-device={name}: torch finds {known} here"
    return None


def found() -> Devices:
    """Return what torch finds; imports it."""
    import torch

    return Devices(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available())


def _ask() -> Devices:
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        return Devices(*json.loads(answer.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise RecipeError(f"--lmcompose-device: torch cannot be asked for its devices: {said[-1]}") from None
