"""`lmcompose doctor`: check what is installed and what is missing."""

from __future__ import annotations

from pathlib import Path

import click

from pytest_lmcompose.cli.problems import FAILED

_MARKS = {"ok": "ok", "absent": "--", "broken": "!!"}


@click.command()
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Folder of the cache, as in pytest's --lmcompose-cache-dir.  [default: ~/.cache/lmcompose]",
)
def doctor(cache_dir: Path | None) -> None:
    """Check the installation: versions, devices, threads, extras, engines, cache.

    `ok`: works. `--`: not installed, needed only by some features. `!!`: broken; the exit code is then 1.
    """
    from pytest_lmcompose.doctor import checks

    broken = 0
    for group, found in checks(cache_dir):
        click.echo(group)
        width = max((len(check.name) for check in found), default=0)
        for check in found:
            broken += check.state == "broken"
            colour = {"ok": "green", "broken": "red"}.get(check.state)
            mark = click.style(_MARKS[check.state], fg=colour)
            click.echo(f"  {mark}  {check.name.ljust(width)}  {check.detail}".rstrip())
            if check.advice:
                click.echo(f"      {' ' * width}  {check.advice}")
    if broken:
        click.echo(f"{broken} broken")
        raise click.exceptions.Exit(FAILED)
