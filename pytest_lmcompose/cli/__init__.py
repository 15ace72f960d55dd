"""The command `lmcompose`: one module a group of commands. Imports no torch."""

from __future__ import annotations

import click

from pytest_lmcompose.cli.cache import cache
from pytest_lmcompose.cli.health import doctor
from pytest_lmcompose.cli.listing import list_
from pytest_lmcompose.cli.merging import merge
from pytest_lmcompose.cli.planning import plan
from pytest_lmcompose.cli.runs import compare, report, show
from pytest_lmcompose.cli.scaffolding import init


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pytest-lmcompose")
def main() -> None:
    """Look at what pytest-lmcompose can do, plans, stored and found; set up a release gate.

    Compositions are built and measured by pytest itself: `pytest compositions --help`.

    Exit codes: 0 done; 1 done, and something is wrong: a comparison failed, an installation is broken; 2 not done:
    a misspelt name, or a file that is not there or cannot be read.
    """


for command in (cache, compare, doctor, init, list_, merge, plan, report, show):
    main.add_command(command)
