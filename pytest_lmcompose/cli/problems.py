"""Exit codes, and the error that ends a command."""

from __future__ import annotations

import click

from pytest_lmcompose.report.text import visible

FAILED = 1
"""Exit code: the command finished with problems."""
REFUSED = 2
"""Exit code: the command could not finish, because of a misspelt name, or a missing or broken file."""


class Refused(click.ClickException):
    """A command that cannot finish; the message says why."""

    exit_code = REFUSED

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(visible, message.splitlines())))
