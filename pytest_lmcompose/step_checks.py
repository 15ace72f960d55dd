"""Check that a step can start: its files are there, its checkpoint fits the model. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interventions.contents import local
from interventions.intervention import checkpoints, unready
from pytest_lmcompose.baseline.reference import architecture_at
from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.composition import Step
from pytest_lmcompose.errors import RecipeError
from pytest_lmcompose.options import Options
from pytest_lmcompose.settings import WorldSettings


def check_step(step: Step, settings: Any, location: str, options: Options, world: WorldSettings) -> None:
    """Raise RecipeError if a step with these settings cannot start on the model at `location` with this world."""
    for key in getattr(settings, "needs", ()):
        if not getattr(world, key, None):
            raise RecipeError(f"{step} needs world.{key}, which is not set: see docs/recipes.md")
    if getattr(settings, "runs_commands", False) and not options.allow_commands:
        raise RecipeError(f"{step} runs a command of yours: permit it with --lmcompose-allow-commands")
    for problem in unready(settings, options.folder):
        raise RecipeError(f"{step}: {problem}")
    for name in checkpoints(settings):
        if (place := local(name, options.folder)) is not None:
            try:
                _check_checkpoint(place, location)
            except RecipeError as error:
                raise RecipeError(f"{step}: {error}") from None


def _check_checkpoint(place: Path, location: str) -> None:
    check_folder(place, tokenizer=False)
    ours, theirs = architecture_at(location), architecture_at(str(place))
    if ours and theirs and ours != theirs and "?" not in ours + theirs:
        raise RecipeError(f"{place} is a {theirs}, but the model is a {ours}")
