"""`lmcompose init`: set up a release gate."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pytest_lmcompose.cli.problems import CommandError

EMBEDDED = "tinyworld"
_OWN = "name your own data in pytest.ini (docs/recipes.md, Use your own data)"
_SERVICES = {"both": ("github", "gitlab"), "github": ("github",), "gitlab": ("gitlab",), "none": ()}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option("--model", default=EMBEDDED, show_default=True, help="Preset, folder with config.json, or hub id.")
@click.option("--compose", metavar="ID", default="memit+awq", show_default=True, help="Composition to release.")
@click.option(
    "--ci", type=click.Choice(sorted(_SERVICES)), default="both", show_default=True, help="CI examples to write."
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
def init(folder: Path, model: str, compose: str, ci: str, force: bool) -> None:
    """Set up a release gate in FOLDER: a test, thresholds, pytest settings, CI examples.

    Existing files are kept unless you pass --force.
    """
    from pytest_lmcompose import scaffold
    from pytest_lmcompose.gate.promises import broken
    from pytest_lmcompose.locate import model_location, model_overrides
    from pytest_lmcompose.options import SUITE_FOLDER
    from pytest_lmcompose.recipe import RecipeError, load_recipe, presets

    conf = SUITE_FOLDER / "conf"
    try:
        recipe = load_recipe(conf, model_overrides(model, conf, Path.cwd()))
        composition = recipe.read(compose)
        model_location(recipe.model.path, Path.cwd())
    except RecipeError as error:
        raise CommandError(str(error)) from None
    if not composition.steps:
        raise CommandError(f"--compose={compose}: a release has at least one step")
    name = model if model in presets(conf, "model") else _from(folder, model)
    texts = scaffold.files(recipe, name, composition, _SERVICES[ci])
    try:
        written, notes = scaffold.write(folder, texts, force=force)
    except scaffold.AlreadyThere as error:
        raise CommandError(str(error)) from None
    except (OSError, ValueError) as error:  # an unwritable folder, unreadable settings
        raise CommandError(f"{folder}: {error}") from None
    for name in written:
        click.echo(f"wrote {folder / name}")
    if model != EMBEDDED:
        notes.append(f"The gate asks about the invented facts of {EMBEDDED}, which only its own model knows: {_OWN}")
    for note in (*notes, *broken(recipe, composition)):
        click.echo(note)
    click.echo(
        "next:\n"
        "  pytest --lmcompose-save=v1   build, measure and gate the release; commit the stored run\n"
        "  pytest                       do the same and compare with the stored run, as CI does"
    )


def _from(folder: Path, model: str) -> str:
    """Return the model name, with a relative path made relative to `folder`."""
    path = os.path.expanduser(model)
    if os.path.isabs(path) or not os.path.isdir(path):
        return model
    found = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return found if found.startswith(os.pardir) else os.path.join(os.curdir, found)
