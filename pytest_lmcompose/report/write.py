"""Writes the reports that are made of the document. Imports what makes them only where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_lmcompose.report.files import append_text, write_text
from pytest_lmcompose.report.options import Outputs
from pytest_lmcompose.results import Report


def write_reports(outputs: Outputs, document: Report, baseline: Report | None, tell: Callable[[str], None]) -> bool:
    """Write every report that is wanted; say whether all files could be written.

    One that cannot be written hinders no other.
    """
    written = True

    def attempt(path: Path, make: Callable[[], str], write: Callable[[Path, str], None]) -> None:
        nonlocal written
        try:
            write(path, make())
        except Exception as error:
            written = False
            tell(f"lmcompose: the report {path} could not be written: {type(error).__name__}: {error}")

    if outputs.html is not None:
        attempt(outputs.html, lambda: _html(document, baseline), write_text)
        from pytest_lmcompose.report.html import undrawn

        if (why := undrawn()) is not None:
            tell(f"lmcompose: {outputs.html}: {why}")
    if outputs.markdown is not None:
        attempt(outputs.markdown, lambda: _markdown(document, baseline), append_text)
    if outputs.latex is not None:
        attempt(outputs.latex, lambda: _latex(document), write_text)
    return written


def _html(document: Report, baseline: Report | None) -> str:
    from pytest_lmcompose.report.html import render

    return render(document, baseline)


def _markdown(document: Report, baseline: Report | None) -> str:
    from pytest_lmcompose.report.markdown import render

    return render(document, baseline)


def _latex(document: Report) -> str:
    from pytest_lmcompose.report.latex import render

    return render(document)
