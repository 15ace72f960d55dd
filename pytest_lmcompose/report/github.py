"""GitHub Actions: annotations of red gates, and the job summary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pytest_lmcompose.report.files import append_text
from pytest_lmcompose.report.text import visible

ANNOTATIONS = 10
"""Annotations of a kind that GitHub shows of a step."""
SUMMARY = 1 << 20
"""Bytes of a step's summary; GitHub drops a larger one."""
_MESSAGE, _TITLE = 4000, 255
"""Characters of an annotation."""
_CUT = "\n\n**The summary is cut here: GitHub shows at most 1 MiB. The JSON report has everything.**\n"


def active(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process runs in GitHub Actions."""
    return environment.get("GITHUB_ACTIONS") == "true"


def annotation_lines(
    failures: Sequence[tuple[str, str]],
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    kind: Literal["error", "warning"] = "error",
) -> Iterator[str]:
    """Yield a workflow command for each failure, a pair of title and message; the last one counts what does not fit.

    `file` is where GitHub shows them, for example the thresholds.
    """
    shown = failures if len(failures) <= ANNOTATIONS else failures[: ANNOTATIONS - 1]
    found = [*shown]
    if len(shown) < len(failures):
        found.append(("lmcompose", f"and {len(failures) - len(shown)} more; the job summary lists them"))
    where = "" if file is None else f"file={_property(_in_workspace(file, environment))},"
    for title, message in found:
        text = visible(message, lines=True)
        yield f"::{kind} {where}title={_property(visible(title)[:_TITLE])}::{_data(text[:_MESSAGE])}"


def add_summary(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Append Markdown to the summary of the step, cut to GitHub's limit; return why it failed, None if it did not."""
    name = environment.get("GITHUB_STEP_SUMMARY")
    if not name:
        return None
    path = Path(name)
    try:
        room = SUMMARY - (path.stat().st_size if path.exists() else 0) - 2
        append_text(path, fitted(text, room))
    except (OSError, ValueError) as error:
        return f"lmcompose: the job summary {path} could not be written: {error}"
    return None


def fitted(text: str, room: int) -> str:
    """Return `text` in at most `room` bytes of UTF-8, cut at the end of a line and marked."""
    if len(encoded := text.encode()) <= room:
        return text
    kept = encoded[: max(0, room - len(_CUT.encode()))].decode(errors="ignore").rpartition("\n")[0]
    return kept + _CUT if room >= len(_CUT) else ""


def _in_workspace(file: Path, environment: Mapping[str, str]) -> str:
    """Return a path relative to the checkout, if it is inside."""
    path, root = file.absolute(), environment.get("GITHUB_WORKSPACE")
    return str(path.relative_to(root)) if root and path.is_relative_to(root) else str(file)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
