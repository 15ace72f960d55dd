"""`lmcompose list`: the names you can use in recipes, flags and compositions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from pytest_lmcompose.cli.problems import CommandError

Row = tuple[str, ...]


@click.command("list")
@click.argument("kinds", nargs=-1, metavar="[methods|evaluators|suites|presets]...")
def list_(kinds: Sequence[str]) -> None:
    """List methods, evaluators, suites and presets; all four by default."""
    from interventions.names import near_names

    for kind in kinds:
        if kind not in KINDS:
            raise CommandError(f"cannot list {kind!r}.{near_names(kind, KINDS)} Known: {', '.join(KINDS)}.")
    chosen = kinds or tuple(KINDS)
    for number, kind in enumerate(dict.fromkeys(chosen)):
        if len(chosen) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}{kind}")
        for line in aligned(KINDS[kind]()):
            click.echo(f"  {line}" if len(chosen) > 1 else line)


def method_rows() -> Iterator[Row]:
    """Yield the name, category and description of every method."""
    from interventions.registry import methods

    for method in methods().values():
        yield method.name, method.category, first_sentence(inspect.getdoc(method.settings_type()) or "")


def evaluator_rows() -> Iterator[Row]:
    """Yield the name of every evaluator, the key that enables it, and its description."""
    from evaluators.registry import BUILT_IN, evaluators

    own = {evaluator.name for evaluator in BUILT_IN}
    for evaluator in evaluators().values():
        key = f"evaluate.{evaluator.name}=true" if evaluator.name in own else f"evaluate.also.{evaluator.name}={{}}"
        yield evaluator.name, key, evaluator.summary


def suite_rows() -> Iterator[Row]:
    """Yield the name, number of compositions and description of every suite."""
    from omegaconf import OmegaConf

    from pytest_lmcompose.recipe import load_recipe, presets
    from pytest_lmcompose.settings import SuiteSettings

    conf = _conf()
    recipe = load_recipe(conf)
    for name in presets(conf, "suite"):
        path = conf / "suite" / f"{name}.yaml"
        suite = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SuiteSettings()), OmegaConf.load(path)))
        assert isinstance(suite, SuiteSettings)
        count = len(dataclasses.replace(recipe, suite=suite).suite_compositions())
        yield name, f"{count} composition{'s' * (count != 1)}", comment(path)


def preset_rows() -> Iterator[Row]:
    """Yield the group, name and description of every preset except suites."""
    from pytest_lmcompose.recipe import groups, presets

    conf = _conf()
    for group in groups():
        if group != "suite":
            for name in presets(conf, group):
                yield f"{group}={name}", comment(conf / group / f"{name}.yaml")


def _conf() -> Path:
    from pytest_lmcompose.options import SUITE_FOLDER

    return SUITE_FOLDER / "conf"


KINDS: dict[str, Callable[[], Iterator[Row]]] = {
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
