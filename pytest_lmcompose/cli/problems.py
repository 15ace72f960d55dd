"""What ends a command early, and with which exit code."""

from __future__ import annotations

import click

from pytest_lmcompose.report.text import visible

FAILED = 1
"""What was asked for was done, and found something wrong."""
REFUSED = 2
"""What was asked for could not be done: a misspelt name, a file that is not there or broken."""


class Refused(click.ClickException):
    """A command that could not do its work; the message says what is in the way."""

    exit_code = REFUSED

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(visible, message.splitlines())))
