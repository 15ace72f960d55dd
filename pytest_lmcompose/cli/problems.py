"""Exit codes, and the error that ends a command."""

from __future__ import annotations

import click

from pytest_lmcompose.report.text import visible

FAILED = 1
"""Exit code: the command finished with problems."""
ERROR = 2
"""Exit code: the command could not finish, for example because of a misspelt name or a missing file."""


class CommandError(click.ClickException):
    """The command cannot finish; the message says why."""

    exit_code = ERROR

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(visible, message.splitlines())))
