"""`lmcompose list`: the names you can use in recipes, flags and compositions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pytest_lmcompose.cli.problems import CommandError

if TYPE_CHECKING:
    from pytest_lmcompose.presets import Conf

Row = tuple[str, ...]


@click.command("list")
@click.argument("kinds", nargs=-1, metavar="[methods|evaluators|suites|presets]...")
@click.option(
    "--conf",
    "--lmcompose-conf",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of your own presets, with the layout of compositions/conf.",
)
def list_(kinds: Sequence[str], conf: Path | None) -> None:
    """List methods, evaluators, suites and presets; all four by default."""
    from interventions.names import near_names
    from pytest_lmcompose.errors import RecipeError

    for kind in kinds:
        if kind not in KINDS:
            raise CommandError(f"cannot list {kind!r}.{near_names(kind, KINDS)} Known: {', '.join(KINDS)}.")
    chosen = kinds or tuple(KINDS)
    for number, kind in enumerate(dict.fromkeys(chosen)):
        if len(chosen) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}{kind}")
        try:
            lines = list(aligned(KINDS[kind](conf)))
        except RecipeError as error:
            raise CommandError(str(error)) from None
        for line in lines:
            click.echo(f"  {line}" if len(chosen) > 1 else line)


def method_rows(conf: Path | None = None) -> Iterator[Row]:
    """Yield the name, category and description of every method."""
    from interventions.registry import methods

    for method in methods().values():
        yield method.name, method.category, first_sentence(inspect.getdoc(method.settings_type()) or "")


def evaluator_rows(conf: Path | None = None) -> Iterator[Row]:
    """Yield the name of every evaluator, the key that enables it, and its description."""
    from evaluators.registry import BUILT_IN, evaluators

    own = {evaluator.name for evaluator in BUILT_IN}
    for evaluator in evaluators().values():
        key = f"evaluate.{evaluator.name}=true" if evaluator.name in own else f"evaluate.also.{evaluator.name}={{}}"
        yield evaluator.name, key, evaluator.summary


def suite_rows(conf: Path | None = None) -> Iterator[Row]:
    """Yield the name, number of compositions and description of every suite."""
    from pytest_lmcompose.locate import conf_folders
    from pytest_lmcompose.recipe import load_recipe, presets

    folders = conf_folders(conf)
    for name in presets(folders, "suite"):
        count = len(load_recipe(folders, [f"suite={name}"]).suite_compositions())
        yield name, f"{count} composition{'s' * (count != 1)}", _about(folders, "suite", name)


def preset_rows(conf: Path | None = None) -> Iterator[Row]:
    """Yield the group, name and description of every preset except suites."""
    from pytest_lmcompose.locate import conf_folders
    from pytest_lmcompose.recipe import groups, presets

    folders = conf_folders(conf)
    for group in groups():
        if group != "suite":
            for name in presets(folders, group):
                yield f"{group}={name}", _about(folders, group, name)


def _about(conf: Conf, group: str, name: str) -> str:
    """Return the first sentence of a preset's comment."""
    from pytest_lmcompose.presets import find

    path = find(conf, f"{group}/{name}.yaml")
    return "" if path is None else comment(path)


KINDS: dict[str, Callable[..., Iterator[Row]]] = {
    "methods": method_rows,
    "evaluators": evaluator_rows,
    "suites": suite_rows,
    "presets": preset_rows,
}


def aligned(rows: Iterator[Row]) -> Iterator[str]:
    """Yield the rows as lines with aligned columns."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)] if table else []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join((*cells, row[-1])).rstrip()


def comment(path: Path) -> str:
    """Return the first sentence of the comment at the top of a YAML file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return first_sentence(" ".join(lines))


def first_sentence(text: str) -> str:
    """Return the first sentence of a text on one line, without its full stop."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence, stop, rest = paragraph.partition(". ")
    while stop and (sentence.endswith(("al", "e.g", "i.e")) or not rest.lstrip('"')[:1].isupper()):
        more, stop, rest = rest.partition(". ")
        sentence += f". {more}"
    return sentence.removesuffix(".")
