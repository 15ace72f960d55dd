"""`lmcompose init`: set up a release gate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from pytest_lmcompose.cli.problems import CommandError

_SERVICES = {"both": ("github", "gitlab"), "github": ("github",), "gitlab": ("gitlab",), "none": ()}
_MODEL = "model.yaml"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option(
    "--model",
    default="tinyworld",
    show_default=True,
    help="Preset, YAML file of one, folder with config.json, or hub id. A folder or id gets the file model.yaml.",
)
@click.option(
    "--world",
    metavar="WORLD",
    help="Data to measure on: preset, or YAML file of one. A file that does not exist is written, to be filled in.",
)
@click.option(
    "--conf",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of your own presets, with the layout of compositions/conf.",
)
@click.option("--compose", metavar="ID", default="memit+awq", show_default=True, help="Composition to release.")
@click.option(
    "--ci", type=click.Choice(sorted(_SERVICES)), default="both", show_default=True, help="CI examples to write."
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
def init(folder: Path, model: str, world: str | None, conf: Path | None, compose: str, ci: str, force: bool) -> None:
    """Set up a release gate in FOLDER: a test, thresholds, pytest settings, CI examples.

    Existing files are kept unless you pass --force.
    """
    from pytest_lmcompose import scaffold
    from pytest_lmcompose.gate.promises import broken
    from pytest_lmcompose.locate import check_world, conf_folders, model_location, model_overrides, preset_overrides
    from pytest_lmcompose.presets import is_preset_file, presets
    from pytest_lmcompose.recipe import RecipeError, load_recipe

    places, here = conf_folders(conf), Path.cwd()
    new_world = _new_world(world, presets(places, "world"))
    try:
        overrides = model_overrides(model, places, here)
        if world is not None:
            overrides += ("world=none",) if new_world else preset_overrides("world", world, places, here)
        recipe = load_recipe(places, overrides)
        composition = recipe.read(compose)
        location = model_location(recipe.model.path, here)
        if world is None:
            check_world(recipe, location, places, here)
    except RecipeError as error:
        raise CommandError(str(error)) from None
    if not composition.steps:
        raise CommandError(f"--compose={compose}: a release has at least one step")
    more, named = {}, {"model": model if model in presets(places, "model") else _from(folder, model)}
    if model not in presets(places, "model") and not is_preset_file(model):
        more[_MODEL], named["model"] = scaffold.model_file(named["model"]), _MODEL
    if world is not None:
        named["world"] = world if new_world or world in presets(places, "world") else _from(folder, world)
    if new_world:
        more[str(world)] = scaffold.world_file()
    if conf is not None:
        named["conf"] = _from(folder, str(conf))
    texts = scaffold.files(recipe, named, composition, _SERVICES[ci]) | more
    try:
        written, notes = scaffold.write(folder, texts, force=force)
    except scaffold.AlreadyThere as error:
        raise CommandError(str(error)) from None
    except (OSError, ValueError) as error:  # an unwritable folder, unreadable settings
        raise CommandError(f"{folder}: {error}") from None
    for name in written:
        click.echo(f"wrote {folder / name}")
    if new_world:
        notes.append(f"Fill in {folder / str(world)} before the first run.")
    for note in (*notes, *broken(recipe, composition)):
        click.echo(note)
    click.echo(
        "next:\n"
        "  pytest --lmcompose-save=v1   build, measure and gate the release; commit the stored run\n"
        "  pytest                       do the same and compare with the stored run, as CI does"
    )


def _new_world(world: str | None, known: Sequence[str]) -> bool:
    """Say whether to write a world: a YAML file inside the release's folder that does not exist."""
    from pytest_lmcompose.presets import is_preset_file

    if world is None or world in known or not is_preset_file(world) or Path(world).expanduser().is_file():
        return False
    if os.path.isabs(os.path.expanduser(world)) or os.pardir in Path(world).parts:
        raise CommandError(f"--world={world}: no such file; to write one, give a path inside the release's folder")
    return True


def _from(folder: Path, name: str) -> str:
    """Return a name, with a relative path made relative to `folder`."""
    path = os.path.expanduser(name)
    if os.path.isabs(path) or not os.path.exists(path):
        return name
    found = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return found if found.startswith(os.pardir) else os.path.join(os.curdir, found)
