"""Check that the selected device exists. Does not import torch: a subprocess does, unless torch is loaded already."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

from pytest_lmcompose.recipe import RecipeError

_TIMEOUT = 300.0
"""In seconds; importing torch from a slow disk and starting a driver take time."""
_SCRIPT = "import json; from pytest_lmcompose.devices import devices; print(json.dumps(devices()))"


class Devices(NamedTuple):
    """Devices of this machine."""

    cuda: int
    """Number of CUDA devices."""
    mps: bool


def check_device(name: str) -> None:
    """Raise RecipeError if torch does not find the device `name`."""
    if name in ("auto", "cpu"):
        return
    problem = device_problem(name, devices() if "torch" in sys.modules else _devices_of_subprocess())
    if problem is not None:
        raise RecipeError(problem)


def device_problem(name: str, available: Devices) -> str | None:
    """Return an error message if the device `name` is not available, else None."""
    if name == "mps" and not available.mps:
        return "--lmcompose-device=mps: torch finds no MPS device here; use auto or cpu"
    if not name.startswith("cuda"):
        return None
    if not available.cuda:
        return f"--lmcompose-device={name}: torch finds no CUDA device here; use auto or cpu"
    if int(name.partition(":")[2] or 0) >= available.cuda:
        known = ", ".join(f"cuda:{number}" for number in range(available.cuda))
        return f"--lmcompose-device={name}: torch finds only {known} here"
    return None


def devices() -> Devices:
    """Return the devices that torch finds; imports torch."""
    import torch

    return Devices(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available())


def _devices_of_subprocess() -> Devices:
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
        return Devices(*json.loads(answer.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise RecipeError(f"--lmcompose-device: cannot list the devices of torch: {said[-1]}") from None
