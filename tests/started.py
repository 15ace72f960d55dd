"""Runs of pytest in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

Finished = subprocess.CompletedProcess[str]


def run_pytest(folder: Path, *arguments: str, timeout: float | None = None, **environment: str) -> Finished:
    """Run pytest in `folder` with further variables of the environment, and return what it said."""
    command = [sys.executable, "-m", "pytest", "-pno:cacheprovider", *arguments]
    variables = os.environ | environment
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
