"""`lmcompose plan`: show the states that a run would build, without running it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import click
import pytest

from pytest_lmcompose.cli.flags import PREFIX, Flag, plugin_flags
from pytest_lmcompose.cli.problems import ERROR

if TYPE_CHECKING:
    from pytest_lmcompose.composition import Composition
    from pytest_lmcompose.run import Run

SHOWN = ("model", "world", "conf", "suite", "compose", "set", "repeats", "shard", "cache-dir", "no-cache")
"""The flags that affect the plan. Other flags are accepted too, so that you can reuse a command line."""


class _Asked:
    """A pytest plugin that asks about the run as soon as options and ini values are known, and collects no tests."""

    def __init__(self, ask: Callable[[Run, Sequence[Composition]], None]) -> None:
        self._ask = ask

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        from pytest_lmcompose import session_checks
        from pytest_lmcompose.failures import usage_errors
        from pytest_lmcompose.options import read_options
        from pytest_lmcompose.session import Session

        session = Session(config, read_options(config))
        session_checks.check(session)
        compositions, shard = session.compositions(), session.options.shard
        mine = frozenset(compositions) if shard is None else shard.of(compositions)
        with usage_errors():
            self._ask(session.run, [c for c in compositions if c in mine])
        return 0


def ask_run(ask: Callable[[Run, Sequence[Composition]], None], values: Mapping[str, Any]) -> None:
    """Call `ask` with the run of some options, which tests nothing, and its compositions; exits if they are wrong."""
    if run_pytest(_Asked(ask), *arguments(values)):
        raise click.exceptions.Exit(ERROR)


def run_pytest(plugin: object, *given: str) -> int:
    """Run pytest with `plugin`, which does the work, and return its exit code; it writes nothing of its own."""
    return pytest.main(["-p", "no:cacheprovider", "-p", "no:terminal", "--assert=plain", *given], plugins=[plugin])


def options(shown: Collection[str], without: Collection[str] = ()) -> list[click.Parameter]:
    """Return the plugin's flags as click options, for example `--model` and `--lmcompose-model`.

    The help lists those that are `shown`; `without` leaves some out.
    """
    return [_option(flag, flag.name not in shown) for flag in plugin_flags()[0] if flag.name not in without]


def _option(flag: Flag, hidden: bool) -> click.Option:
    value: dict[str, Any] = {"is_flag": True}
    if flag.metavar is not None:
        value = {"metavar": flag.metavar, "multiple": flag.repeatable}
        if flag.alone is not None:
            value |= {"is_flag": False, "flag_value": flag.alone}
    names = [f"--{flag.name}", PREFIX + flag.name, flag.name.replace("-", "_")]
    return click.Option(names, help=flag.help, hidden=hidden, **value)


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Convert parsed click options to pytest arguments."""
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
    """Print the states that a run would build, and their estimated cost.

    Takes the options of `pytest compositions` and reads the same ini files, but collects and builds nothing. For the
    plan of tests selected with -k or -m, use `pytest compositions -k ... --lmcompose-plan`.
    """
    lines: list[str] = []
    ask_run(lambda run, compositions: lines.extend(run.plan(compositions)), values)
    for line in lines:
        click.echo(line)


class RunCommand(click.Command):
    """A command that also takes the plugin's flags; they are created on first use, because importing them is slow."""

    def __init__(self, *args: Any, shown: Sequence[str], without: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Show the flags `shown`; take all others too, except those `without`, or none if it is None."""
        super().__init__(*args, **kwargs)
        self._shown, self._without = shown, without
        self._complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self._complete:
            without = self._without
            found = options(self._shown, () if without is None else without)
            self.params += [o for o in found if without is not None or not cast(click.Option, o).hidden]
            self._complete = True
        return super().get_params(ctx)


plan = RunCommand("plan", callback=_plan, help=_plan.__doc__, shown=SHOWN, without=())
