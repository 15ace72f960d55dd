"""`lmcompose init`: a release repository's gate."""

from __future__ import annotations

from pathlib import Path

import click

from pytest_lmcompose.cli.problems import Refused

_SERVICES = {"both": ("github", "gitlab"), "github": ("github",), "gitlab": ("gitlab",), "none": ()}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option("--model", default="tinyworld", show_default=True, help="Preset, folder with config.json, or hub id.")
@click.option("--compose", metavar="ID", default="memit+awq", show_default=True, help="What is released.")
@click.option("--ci", type=click.Choice(sorted(_SERVICES)), default="both", show_default=True, help="CI services.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def init(folder: Path, model: str, compose: str, ci: str, force: bool) -> None:
    """Write the gate of a release into FOLDER: a test, thresholds, pytest's settings, CI examples.

    Nothing is overwritten without --force.
    """
    from pytest_lmcompose import scaffold
    from pytest_lmcompose.locate import model_location, model_overrides
    from pytest_lmcompose.options import SUITE_FOLDER
    from pytest_lmcompose.recipe import RecipeError, load_recipe

    conf = SUITE_FOLDER / "conf"
    try:
        recipe = load_recipe(conf, model_overrides(model, conf, folder.resolve()))
        composition = recipe.read(compose)
        model_location(recipe.model.path, folder.resolve())
    except RecipeError as error:
        raise Refused(str(error)) from None
    if not composition.steps:
        raise Refused(f"--compose={compose}: a release has at least one step")
    texts = scaffold.files(recipe, model, composition, _SERVICES[ci])
    try:
        notes = scaffold.write(folder, texts, force=force)
    except scaffold.AlreadyThere as error:
        raise Refused(str(error)) from None
    except (OSError, ValueError) as error:  # a folder that may not be written, settings that cannot be read
        raise Refused(f"{folder}: {error}") from None
    for name in texts:
        if not (notes and name == scaffold.SETTINGS):
            click.echo(f"wrote {folder / name}")
    for note in notes:
        click.echo(note)
    click.echo(
        "next:\n"
        "  pytest                       builds, measures and judges the release\n"
        "  pytest --lmcompose-save=v1   does so and stores the run in .lmcompose: commit it, and CI compares with it"
    )
