"""Resolve the name of a model or world: a preset, a file or folder, or a hub id. Imports no torch."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from interventions.contents import is_path
from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.presets import THRESHOLDS, Conf, folders, is_preset_file
from pytest_lmcompose.recipe import Recipe, RecipeError, near_names, presets, quoted
from pytest_lmcompose.settings import SOURCES

CONF = SUITE_FOLDER / "conf"
"""The presets of the suite."""


def conf_folders(folder: Path | None) -> Conf:
    """Return the folders of presets: the user's, if there is one, and the suite's."""
    return CONF if folder is None else (folder.absolute(), CONF)


def preset_overrides(group: str, name: str, conf: Conf, folder: Path) -> tuple[str, ...]:
    """Return the recipe overrides for a preset, or for the path of its YAML file (relative to `folder`)."""
    if name in presets(conf, group) or not is_preset_file(name):
        return (f"{group}={quoted(name)}",)
    path = folder / os.path.expanduser(name)
    if not path.is_file():
        raise RecipeError(f"--lmcompose-{group}={name}: no such file: {path}")
    return (f"{group}={quoted(str(path))}",)


def model_overrides(name: str, conf: Conf, folder: Path) -> tuple[str, ...]:
    """Return the recipe overrides for `--lmcompose-model=name`.

    The name is a preset, a YAML file of one, a folder (both relative to `folder`), or a hub id, in this order. Raises
    RecipeError for a missing file or folder, ModelError for a folder without a model.
    """
    known = presets(conf, "model")
    if name in known or is_preset_file(name):
        return preset_overrides("model", name, conf, folder)
    path = folder / os.path.expanduser(name)
    if path.exists() and not (path / "config.json").is_file():
        check_folder(path)
    if path.exists():
        return ("model=any", f"model.path={quoted(str(path))}")
    if is_path(name, path):
        raise RecipeError(f"no such model folder: {path}.{near_names(name, known)}")
    if "/" not in name and difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        raise RecipeError(
            f"unknown model {name!r}: it is neither a preset nor a folder.{near_names(name, known)} "
            f"Presets: {', '.join(known)}."
        )
    return ("model=any", f"model.path={quoted(name)}")


def model_location(path: str, folder: Path) -> str:
    """Return the absolute folder, GGUF file or hub id to load.

    A relative folder is looked up in `folder`, then in the suite's folder. Raises RecipeError for an empty path or a
    missing folder, ModelError for a folder without a model.
    """
    if not path:
        raise RecipeError("model.path is empty: name a folder with config.json, a GGUF file, or a hub id")
    for base in (folder, SUITE_FOLDER):
        candidate = base / os.path.expanduser(path)
        if (candidate / "config.json").is_file():
            return str(candidate)
    candidate = folder / os.path.expanduser(path)
    if candidate.exists():
        check_folder(candidate)
        return str(candidate)
    if is_path(path, candidate) or is_path(path, SUITE_FOLDER / path):
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


def check_world(recipe: Recipe, location: str, conf: Conf, folder: Path) -> None:
    """Check a world that the user did not name; raises RecipeError, which lists the worlds.

    Without a world there is nothing to ask, and the facts of the embedded world are known to the embedded model only.
    """
    world, inside = recipe.world, SUITE_FOLDER / "tinyworld"
    asks = world.forget or world.pools or recipe.evaluate.tasks or any(getattr(world, key) for key in SOURCES)
    invented = bool(world.folder) and world_folder(world.folder, folder).is_relative_to(inside)
    if asks and (not invented or Path(location).is_relative_to(inside)):
        return
    known = ", ".join(name for name in presets(conf, "world") if name != "none")
    raise RecipeError(
        f"no world for the model {recipe.model.path}: choose the data to measure on, for example "
        f"--lmcompose-world=paper, or --lmcompose-world=FILE.yaml for your own. Known: {known}"
    )


def thresholds_file(recipe: Recipe, location: str, conf: Conf, folder: Path) -> Path:
    """Return the file of `world.thresholds`, in a folder of presets or the world's; raises RecipeError.

    The embedded world's bounds are for the embedded model: others get those relative to the base model.
    """
    name = recipe.world.thresholds
    if name == "tinyworld.yaml" and not Path(location).is_relative_to(SUITE_FOLDER):
        name = "relative.yaml"
    places = [*(place / THRESHOLDS for place in folders(conf)), world_folder(recipe.world.folder, folder), folder]
    for place in places:
        if (path := place / os.path.expanduser(name)).is_file():
            return path
    raise RecipeError(f"world.thresholds={name}: no such file (looked in {', '.join(map(str, places))})")
