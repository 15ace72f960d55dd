"""Write the HTML, Markdown and LaTeX reports; each module is imported only if its report is wanted."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from pytest_lmcompose.report.files import append_text, write_text
from pytest_lmcompose.report.options import Outputs
from pytest_lmcompose.results import Report


def write_reports(outputs: Outputs, report: Report, baseline: Report | None, log: Callable[[str], None]) -> bool:
    """Write every wanted report and return whether all were written; a failure does not stop the others."""
    written = True
    for path, module, write, arguments in (
        (outputs.html, "html", write_text, (report, baseline)),
        (outputs.markdown, "markdown", append_text, (report, baseline)),
        (outputs.latex, "latex", write_text, (report,)),
    ):
        if path is None:
            continue
        try:
            write(path, importlib.import_module(f"pytest_lmcompose.report.{module}").render(*arguments))
        except Exception as error:
            written = False
            log(f"lmcompose: the report {path} could not be written: {type(error).__name__}: {error}")
    if outputs.html is not None:
        from pytest_lmcompose.report.html import missing_figures

        if (reason := missing_figures()) is not None:
            log(f"lmcompose: {outputs.html}: {reason}")
    return written
