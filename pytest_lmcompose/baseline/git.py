"""Read the commit and the uncommitted files of a folder from git."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CACHES = ("__pycache__", ".pytest_cache")


def commit(folder: Path) -> str | None:
    """Return the current commit; None without a commit or without git."""
    found = _git(folder, "rev-parse", "HEAD")
    return found.strip() if found is not None else None


def changes(folder: Path, but: Path) -> list[str]:
    """Return the repository's uncommitted files, except ignored ones, caches of Python and files in the folder `but`.

    Empty without a repository or without git.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return []
    listed = _git(folder, "status", "--porcelain", "--untracked-files=all", "-z", "--no-renames")
    paths = [entry[3:] for entry in (listed or "").split("\0") if entry]
    root = Path(top.strip())
    return [
        path
        for path in paths
        if not set(Path(path).parts) & set(_CACHES) and not (root / path).resolve().is_relative_to(but.resolve())
    ]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
