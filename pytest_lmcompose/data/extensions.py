"""Tables of functions by name that other packages extend, by entry points or by a call. No torch."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T")


def add(table: dict[str, T], name: str, function: T, what: str) -> None:
    """Add `function` to `table`; raises ValueError, which names `what` it is, if the name has another one."""
    if table.setdefault(name, function) is not function:
        raise ValueError(f"another function redefines the {what} {name!r}: {function!r}")


def add_installed(table: dict[str, T], group: str, what: str) -> dict[str, T]:
    """Add the entry points of `group` to `table` and return it; raises ValueError as `add` does."""
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        add(table, entry.name, entry.load(), what)
    return table
