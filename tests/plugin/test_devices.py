"""--lmcompose-device: what is not here is a usage error, said once, and no torch in the controller that collects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from pytest_lmcompose import devices
from pytest_lmcompose.devices import Devices, check_device, device_problem
from pytest_lmcompose.recipe import RecipeError
from tests.plugin.conftest import ROOT

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
NO_MPS = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")


@pytest.mark.parametrize(
    ("name", "here", "problem"),
    [
        ("auto", Devices(0, False), None),
        ("cpu", Devices(0, False), None),
        ("mps", Devices(0, True), None),
        ("mps", Devices(8, False), "finds no MPS device"),
        ("cuda", Devices(1, False), None),
        ("cuda", Devices(0, True), "finds no CUDA device"),
        ("cuda:0", Devices(0, False), "finds no CUDA device"),
        ("cuda:1", Devices(2, False), None),
        ("cuda:2", Devices(2, False), "torch finds only cuda:0, cuda:1 here"),
        ("cuda:99", Devices(1, False), "torch finds only cuda:0 here"),
    ],
)
def test_a_device_must_exist(name: str, here: Devices, problem: str | None) -> None:
    found = device_problem(name, here)
    assert found is None if problem is None else problem in (found or "")
    assert found is None or found.startswith(f"--lmcompose-device={name}: ")


@NO_GPU
@pytest.mark.parametrize("arguments", [(), ("-n", "2"), ("--collect-only",), ("--lmcompose-plan",)])
def test_missing_cuda_is_reported_once(refused: Callable[..., str], arguments: tuple[str, ...]) -> None:
    error = refused("--lmcompose-device=cuda:99", *arguments, compose=("nudge", "round"))
    assert error.count("--lmcompose-device=cuda:99: torch finds no CUDA device here") == 1
    assert "Traceback" not in error


@NO_MPS
def test_missing_mps(refused: Callable[..., str]) -> None:
    assert "--lmcompose-device=mps: torch finds no MPS device here" in refused("--lmcompose-device=mps")


@pytest.mark.parametrize("name", ["cuda:", "cuda:-1", "cuda:007", "cuda:1e3", "CUDA", "gpu", "cuda:0,1", " cuda"])
def test_invalid_names(refused: Callable[..., str], name: str) -> None:
    assert "--lmcompose-device: expected auto, cpu, mps, cuda or cuda:N" in refused(f"--lmcompose-device={name}")


@NO_GPU
def test_the_check_imports_torch_in_a_subprocess_only() -> None:
    code = f"""
import sys, pytest
options = ["--rootdir={ROOT}", "-c{ROOT}/pyproject.toml", "--collect-only", "-q", "-pno:cacheprovider"]
rc = pytest.main([{str(ROOT / "compositions")!r}, *options, "--lmcompose-device=cuda:99"])
print("RC", int(rc), "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RC 4 False" in result.stdout
    assert "torch finds no CUDA device here" in result.stderr


def test_a_broken_torch_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_SCRIPT", "raise SystemExit('libcudart.so.12: cannot open')")
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(RecipeError, match=r"--lmcompose-device: cannot list the devices of torch.*libcudart\.so\.12"):
        check_device("cuda")
