"""`lmcompose cache`: inspect and empty the cache."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from pathlib import Path
from typing import Any

import click

from pytest_lmcompose.cache.folder import Cache, default_folder
from pytest_lmcompose.cache.remote import is_url, local_path
from pytest_lmcompose.costs import size


class _Folder(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reject URLs, which click would take for folder names."""
        if isinstance(value, str):
            if is_url(value):
                self.fail(f"{value} is not a folder; use the tools of that storage", param, ctx)
            value = local_path(value)
        return super().convert(value, param, ctx)


_FOLDER = click.option(
    "--cache-dir",
    type=_Folder(file_okay=False, path_type=Path),
    help="Folder of the cache, as in pytest's --lmcompose-cache-dir.  [default: ~/.cache/lmcompose]",
)


@click.group()
def cache() -> None:
    """Inspect or empty the cache of states and measurements."""


@cache.command()
@_FOLDER
@click.option("--entries", is_flag=True, help="List all entries, most recently used first.")
def show(cache_dir: Path | None, entries: bool) -> None:
    """Show how many entries the cache contains, and their size."""
    store = _store(cache_dir)
    listed = store.entries()
    about = {entry.folder: store.about(entry) for entry in listed}
    total, bytes_of = Counter[str](), Counter[str]()
    for entry in listed:
        kind = about[entry.folder][0]
        total[kind] += 1
        bytes_of[kind] += entry.bytes
    click.echo(f"{store.folder}: {len(listed)} entries, {size(sum(bytes_of.values()))}")
    for kind in sorted(total):
        click.echo(f"  {kind:<12}  {total[kind]:>6}  {size(bytes_of[kind])}")
    if not entries:
        return
    for entry in reversed(listed):
        kind, what = about[entry.folder]
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", "seconds")
        click.echo(f"{used}  {size(entry.bytes):>10}  {kind:<12}  {what.get('composition', entry.folder.name)}")


@cache.command()
@_FOLDER
def clear(cache_dir: Path | None) -> None:
    """Remove all entries from the cache."""
    store = _store(cache_dir)
    listed = store.entries()
    store.clear()
    left = store.entries()
    click.echo(f"{store.folder}: {len(listed) - len(left)} entries removed, {size(sum(e.bytes for e in listed))}")
    if left:
        raise click.ClickException(f"{len(left)} entries could not be removed; check that you may write to this folder")


def _store(folder: Path | None) -> Cache:
    return Cache(folder or default_folder(os.environ), limit=0, warn=lambda line: click.echo(line, err=True))
