"""The command `lmcompose`, with one module per group of commands. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from pytest_lmcompose.cli.cache import cache
from pytest_lmcompose.cli.checkpoints import build, gate, verify
from pytest_lmcompose.cli.health import doctor
from pytest_lmcompose.cli.history import runs
from pytest_lmcompose.cli.listing import list_
from pytest_lmcompose.cli.merging import merge
from pytest_lmcompose.cli.planning import plan
from pytest_lmcompose.cli.predicting import predict
from pytest_lmcompose.cli.runs import compare, report, show
from pytest_lmcompose.cli.scaffolding import init
from pytest_lmcompose.cli.searching import repair, tune


class _Commands(click.Group):
    """Rejects empty values, for example from an unset shell variable."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        for empty in _empty(args):
            raise click.UsageError(f"{empty}: the value is empty; give one or remove the option", ctx)
        return super().resolve_command(ctx, args)


def _empty(words: Sequence[str]) -> Iterator[str]:
    """Yield each flag with an empty value, and the word before each empty argument."""
    for before, word in zip(("", *words), words, strict=False):
        if not word.strip():
            yield before
        elif match := re.fullmatch(r"(--?[\w-]+)=\s*", word):
            yield match[1]


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pytest-lmcompose")
def main() -> None:
    """Inspect methods, plans, stored runs and your installation; write and verify checkpoints; set up a release gate.

    To build and measure several compositions, use pytest: see `pytest compositions --help`.

    Exit codes: 0 success; 1 finished with problems, for example a failed comparison or a broken installation; 2 not
    finished, for example because of a misspelt name or an unreadable file.
    """


for command in (
    build,
    cache,
    compare,
    doctor,
    gate,
    init,
    list_,
    merge,
    plan,
    predict,
    repair,
    report,
    runs,
    show,
    tune,
    verify,
):
    main.add_command(command)
