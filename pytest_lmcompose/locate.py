"""Resolve the name of a model or world: a preset, a folder, or a hub id. Imports no torch."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.recipe import RecipeError, near_names, presets, quoted

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_overrides(name: str, conf: Path, folder: Path) -> tuple[str, ...]:
    """Return the recipe overrides for `--lmcompose-model=name`.

    The name is a preset of conf/model, a folder (relative to `folder`), or a hub id, in this order. Raises RecipeError
    for a missing folder, ModelError for a folder without a model.
    """
    known = presets(conf, "model")
    if name in known:
        return (f"model={name}",)
    path = folder / os.path.expanduser(name)
    if path.exists() and not (path / "config.json").is_file():
        check_folder(path)  # raises an error that says what it is
    if path.exists():
        return ("model=any", f"model.path={quoted(str(path))}")
    if _is_path(name, path):
        raise RecipeError(f"no such model folder: {path}.{near_names(name, known)}")
    if "/" not in name and difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        raise RecipeError(
            f"unknown model {name!r}: it is neither a preset nor a folder.{near_names(name, known)} "
            f"Presets: {', '.join(known)}."
        )
    return ("model=any", f"model.path={quoted(name)}")


def model_location(path: str, folder: Path) -> str:
    """Return the absolute folder or hub id for transformers to load.

    A relative folder is looked up in `folder`, then in the suite's folder. Raises RecipeError for an empty path or a
    missing folder, ModelError for a folder without a model.
    """
    if not path:
        raise RecipeError("model.path is empty: name a folder with config.json, or a hub id")
    for base in (folder, SUITE_FOLDER):
        candidate = base / os.path.expanduser(path)
        if (candidate / "config.json").is_file():
            return str(candidate)
    candidate = folder / os.path.expanduser(path)
    if candidate.exists():
        check_folder(candidate)
    if _is_path(path, candidate) or _is_path(path, SUITE_FOLDER / path):
        raise RecipeError(f"no such model folder: {path} (looked in {folder} and {SUITE_FOLDER})")
    return path


def world_folder(path: str, folder: Path) -> Path:
    """Return the folder of a world's data: relative to `folder`, then to the suite's; empty means `folder`.

    Raises RecipeError if there is none.
    """
    for base in (folder, SUITE_FOLDER):
        candidate = base / os.path.expanduser(path)
        if candidate.is_dir():
            return candidate
    raise RecipeError(f"world.folder={path!r}: no such folder (looked in {folder} and {SUITE_FOLDER})")


def _is_path(name: str, path: Path) -> bool:
    """Return whether `name` must be a path: it is not a valid hub id, or its parent folder exists."""
    if not _HUB_ID.fullmatch(name) or (os.sep != "/" and os.sep in name):
        return True
    return "/" in name and path.parent.is_dir()
