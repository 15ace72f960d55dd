"""Run the command as `python -m pytest_lmcompose.cli`."""

from pytest_lmcompose.cli import main

main()
