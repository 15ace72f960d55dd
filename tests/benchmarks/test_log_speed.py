"""`lmcompose gate OLD NEW` on logs of 100,000 samples."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.plugin.test_logs import lm_eval

pytestmark = pytest.mark.benchmark

SAMPLES = 100_000
_TORCH = "import sys; from pytest_lmcompose.cli import main; main(sys.argv[1:], standalone_mode=False); "


def test_100000_samples_are_judged_in_two_seconds_without_torch(tmp_path: Path) -> None:
    generator = random.Random(0)
    logs = [
        lm_eval(tmp_path / name, [float(generator.random() < 0.7) for _ in range(SAMPLES)]) for name in ("old", "new")
    ]
    command = [sys.executable, "-c", _TORCH + "assert 'torch' not in sys.modules", "gate", *map(str, logs)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--fail", "toy_task/acc:p0.0001"], capture_output=True, text=True, check=False)
    assert time.perf_counter() - start < 2
    assert (done.returncode, "0 of 1 gate failed" in done.stdout) == (0, True), done.stderr
