"""`lmcompose plan`: the tree of states that a run would build, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import pytest

from pytest_lmcompose.cli.flags import PREFIX, Flag, plugin_flags
from pytest_lmcompose.cli.problems import REFUSED

SHOWN = ("model", "suite", "compose", "set", "repeats", "shard", "cache-dir", "no-cache")
"""The flags that the plan depends on. The others are taken too, so that a command line can be used as it is."""


class _Plan:
    """Prints the plan where pytest would begin to collect: its options and ini values are read by then."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        from pytest_lmcompose.options import read_options
        from pytest_lmcompose.session import Session

        session = Session(config, read_options(config))
        session.check()
        compositions, shard = session.compositions(), session.options.shard
        mine = frozenset(compositions) if shard is None else shard.of(compositions)
        self.lines += session.run.plan(c for c in compositions if c in mine)
        return 0


def options() -> list[click.Parameter]:
    """Return the plugin's flags as options of click, named `--model` as well as `--lmcompose-model`."""
    return [_option(flag) for flag in plugin_flags()[0]]


def _option(flag: Flag) -> click.Option:
    value: dict[str, Any] = {"is_flag": True}
    if flag.metavar is not None:
        value = {"metavar": flag.metavar, "multiple": flag.repeatable}
        if flag.alone is not None:
            value |= {"is_flag": False, "flag_value": flag.alone}
    names = [f"--{flag.name}", PREFIX + flag.name, flag.name.replace("-", "_")]
    return click.Option(names, help=flag.help, hidden=flag.name not in SHOWN, **value)


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Return pytest's arguments for what click has read."""
    found = []
    for key, value in values.items():
        flag = PREFIX + key.replace("_", "-")
        if value is True:
            found.append(flag)
        elif value is not None and value is not False:
            each = value if isinstance(value, tuple) else (value,)
            found += [f"{flag}={item}" for item in each]
    return found


def _plan(**values: Any) -> None:
    """Print the tree of states that a run would build, and what it will cost.

    The options are those of `pytest compositions`, and ini files are read as there; nothing is collected or built.
    For the plan of tests chosen by -k or -m, use `pytest compositions -k ... --lmcompose-plan`.
    """
    printer = _Plan()
    given = arguments(values)
    # Neither tests nor their conftest files matter: the folder is named only so that none is looked for.
    code = pytest.main(["-p", "no:cacheprovider", "-p", "no:terminal", "--assert=plain", *given], plugins=[printer])
    for line in printer.lines:
        click.echo(line)
    if code:
        raise click.exceptions.Exit(REFUSED)


class _PlanCommand(click.Command):
    """Builds its options when they are first needed: the flags take some time to import."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            self.params = options()
        return super().get_params(ctx)


plan = _PlanCommand("plan", callback=_plan, help=_plan.__doc__)
