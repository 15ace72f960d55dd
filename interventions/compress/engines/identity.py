"""The identity of an upstream engine in cache addresses: package versions and driver code."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from interventions.compress.engines.table import ENGINES, OWN, interpreter
from interventions.types import InterventionError

_WORKERS = Path(__file__).parent / "engine_workers"
_LIST = (
    "import json, sys; from importlib.metadata import distributions; print(json.dumps([sys.version, "
    "*sorted(f'{d.metadata[\"Name\"]}=={d.version}' for d in distributions())]))"
)


def engine_identity(settings: Any) -> dict[str, Any] | None:
    """Return what identifies the engine that `settings` name, as plain data; None for the project's own kernels.

    It has the package versions of the engine's interpreter and the hashes of the driver code.
    """
    name = getattr(settings, "engine", OWN)
    engine = next((engine for engine in ENGINES if engine.name == name), None)
    if engine is None:
        return None
    try:
        python = interpreter(engine, settings.engine_python)
    except InterventionError as error:  # the step says so
        return {"engine": name, "absent": str(error)}
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(_WORKERS.glob("*.py"))}
    return {"engine": name, "packages": _packages(python, os.environ.get("PYTHONPATH", "")), "code": sources}


@cache
def _packages(python: str, path: str) -> Any:
    """Return the version of an interpreter and of all packages it finds; cached per process (0.2 s)."""
    try:
        found = subprocess.run([python, "-c", _LIST], capture_output=True, text=True, timeout=120, check=True)
        return json.loads(found.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
