"""`lmcompose predict`: which order of two steps is better, from the states of single steps."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pytest_lmcompose.cli.listing import aligned
from pytest_lmcompose.cli.planning import SHOWN, RunCommand, arguments, ask_run
from pytest_lmcompose.cli.problems import FAILED

if TYPE_CHECKING:
    from pytest_lmcompose.composition import Composition
    from pytest_lmcompose.prediction.states import Predicted
    from pytest_lmcompose.run import Run


def _predict(as_json: bool, **values: Any) -> None:
    """Predict which order of each pair of steps is better, without building any.

    Takes the options of `pytest compositions`, and reads the state of each step alone from the cache of earlier runs
    with the same options. The table says for each promise which step to apply first and what that gains, or that it
    cannot tell. The exit code is 1 if states are missing; the command that builds them is printed. See
    docs/prediction.md for the method and for how often it is right.
    """
    found: list[Predicted] = []

    def ask(run: Run, compositions: Sequence[Composition]) -> None:
        from pytest_lmcompose.data.records import WorldError
        from pytest_lmcompose.errors import ModelError, RecipeError
        from pytest_lmcompose.prediction.records import pairs_of
        from pytest_lmcompose.prediction.states import predict

        if run.run_cache is None:
            raise RecipeError("predictions need the states in the cache: remove --lmcompose-no-cache")
        if not pairs_of(compositions):
            raise RecipeError("no composition has two different steps: give some, such as --compose=memit+awq")
        try:
            found.append(predict(run.manager, run.data[0], compositions))
        except (WorldError, ModelError) as error:
            raise RecipeError(str(error)) from None

    ask_run(ask, values)
    (predicted,) = found
    if as_json:
        click.echo(
            json.dumps({"pairs": [pair.plain() for pair in predicted.pairs], "missing": [*predicted.missing]}, indent=1)
        )
    elif predicted.pairs:
        from pytest_lmcompose.prediction.lines import UNITS, rows

        for line in aligned(rows(predicted.pairs)):
            click.echo(line)
        click.echo(UNITS)
    if predicted.missing:
        given = [
            flag for flag in arguments(values) if not flag.startswith(("--lmcompose-compose", "--lmcompose-suite"))
        ]
        steps = [f"--lmcompose-compose={step}" for step in predicted.missing]
        names = (_missing(*item) for item in predicted.missing.items())
        click.echo(f"not in the cache: {', '.join(names)}; build these with", err=as_json)
        click.echo("    " + shlex.join(["pytest", "compositions", *given, *steps]), err=as_json)
        raise click.exceptions.Exit(FAILED)


def _missing(step: str, differences: Sequence[str] | None) -> str:
    changed = ", ".join("model" if part == "before" else part for part in differences or ())
    return step if differences is None else f"{step} (one is there with other {changed})"


predict = RunCommand(
    "predict",
    callback=_predict,
    help=_predict.__doc__,
    params=[click.Option(["--json", "as_json"], is_flag=True, help="Print the predictions as JSON.")],
    shown=SHOWN,
    without=("json",),
)
