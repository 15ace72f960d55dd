"""Write the report's tables without pytest's terminal reporter."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import click

from pytest_lmcompose.report.text import visible


class Console:
    """Implements the methods of `pytest.TerminalReporter` that the tables use; colours only on a terminal."""

    def __init__(self) -> None:
        self._tw = SimpleNamespace(fullwidth=shutil.get_terminal_size((120, 24)).columns - 1)

    def section(self, title: str, sep: str = "=", **markup: bool) -> None:
        """Write a heading across the full width."""
        self.write_line(f" {title} ".center(self._tw.fullwidth, sep), **markup)

    def write(self, text: str, **markup: bool) -> None:
        """Write text without a newline."""
        click.echo(_styled(text, markup), nl=False)

    def write_line(self, text: str, **markup: bool) -> None:
        """Write a line."""
        click.echo(_styled(visible(text), markup))

    def ensure_newline(self) -> None:
        """Do nothing; no other output needs to be completed."""


def _styled(text: str, markup: dict[str, Any]) -> str:
    colour = next((name for name in ("red", "green", "yellow") if markup.get(name)), None)
    return click.style(text, fg=colour, bold=markup.get("bold") or None)
