"""The command `lmcompose`: one module a group of commands. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from pytest_lmcompose.cli.cache import cache
from pytest_lmcompose.cli.health import doctor
from pytest_lmcompose.cli.listing import list_
from pytest_lmcompose.cli.merging import merge
from pytest_lmcompose.cli.planning import plan
from pytest_lmcompose.cli.runs import compare, report, show
from pytest_lmcompose.cli.scaffolding import init


class _Commands(click.Group):
    """Refuses empty values, such as that of a variable that is not set, which would mean the default or a folder."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        for empty in _empty(args):
            raise click.UsageError(f"{empty}: the value is empty; give one, or leave it away", ctx)
        return super().resolve_command(ctx, args)


def _empty(words: Sequence[str]) -> Iterator[str]:
    """Yield what has an empty value: a flag, or an argument by the word before it."""
    for before, word in zip(("", *words), words, strict=False):
        if not word.strip():
            yield before
        elif match := re.fullmatch(r"(--?[\w-]+)=\s*", word):
            yield match[1]


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pytest-lmcompose")
def main() -> None:
    """Look at what pytest-lmcompose can do, plans, stored and found; set up a release gate.

    Compositions are built and measured by pytest itself: `pytest compositions --help`.

    Exit codes: 0 done; 1 done, and something is wrong: a comparison failed, an installation is broken; 2 not done:
    a misspelt name, or a file that is not there or cannot be read.
    """


for command in (cache, compare, doctor, init, list_, merge, plan, report, show):
    main.add_command(command)
