"""Which reports are written beside the JSON, and how the terminal's table is laid out: flags and their values.

Imports none of the libraries that write them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_lmcompose.report.files import path_of

GROUPS = ("category", "first")
BY_ID = "id"


@dataclass(frozen=True)
class Tracking:
    """Where a run is tracked on Weights & Biases."""

    project: str
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What the terminal's table shows, and in which order."""

    columns: tuple[str, ...] = ()
    """Globs over metrics, in the order of the columns; none: those with a threshold."""
    sort: str | None = None
    """A metric, the best value first, or `id`; a leading `-` turns it round. None: in the order of the tests."""
    group: str | None = None
    """category or first: the table's rows by the categories of their steps, or by their first step."""


@dataclass(frozen=True)
class Outputs:
    """What the user wants to see of a run, and where."""

    html: Path | None = None
    markdown: Path | None = None
    latex: Path | None = None
    layout: Layout = Layout()
    tracking: Tracking | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The files to write, by their flag."""
        named = {"html": self.html, "markdown": self.markdown, "latex": self.latex}
        return {f"--lmcompose-{name}": path for name, path in named.items() if path is not None}

    @property
    def wanted(self) -> bool:
        """Whether anything is to be made of the report's document."""
        return bool(self.files) or self.tracking is not None


FLAGS = (
    ("html", "write the report as one page that needs no network to this file", "PATH"),
    ("markdown", "append a summary to this file, such as the job summary of a CI service", "PATH"),
    ("latex", "write tables of order-free error and order sensitivity to this file", "PATH"),
    (
        "columns",
        "metrics in the terminal's table, globs with commas between (default: those with a threshold)",
        "GLOBS",
    ),
    ("sort", "sort the terminal's table by a metric, the best first, or by id; -METRIC: the worst first", "METRIC"),
    ("group", "group the terminal's table by category or first (step)", "HOW"),
    ("wandb", "track the run in this project of Weights & Biases; needs the extra wandb", "PROJECT"),
    ("wandb-entity", "user or team that the project belongs to (default: the user's own)", "NAME"),
    ("wandb-tags", "tags of the tracked run, with commas between", "TAGS"),
)
"""Name, help and metavar of each flag with a value."""


def read_outputs(value: Callable[[str], str | None], folder: Path) -> Outputs:
    """Read the flags; `value` returns what was given for one, relative paths count from `folder`.

    Raises pytest.UsageError for a value that cannot be used.
    """
    group = value("group")
    if group is not None and group not in GROUPS:
        raise pytest.UsageError(f"--lmcompose-group: expected {' or '.join(GROUPS)}, not {group!r}")
    sort = value("sort")
    if sort is not None and not sort.removeprefix("-"):
        raise pytest.UsageError(f"--lmcompose-sort: expected the name of a metric, or {BY_ID}, not {sort!r}")
    return Outputs(
        html=path_of(value("html"), folder),
        markdown=path_of(value("markdown"), folder),
        latex=path_of(value("latex"), folder),
        layout=Layout(_listed(value("columns")), sort, group),
        tracking=_tracking(value),
    )


def _tracking(value: Callable[[str], str | None]) -> Tracking | None:
    project, entity, tags = value("wandb"), value("wandb-entity"), _listed(value("wandb-tags"))
    if project is None:
        for flag, given in (("entity", entity), ("tags", tags)):
            if given:
                raise pytest.UsageError(f"--lmcompose-wandb-{flag}: there is no project; give --lmcompose-wandb too")
        return None
    # A folder `wandb`, which offline runs leave behind, is found as a package without a file.
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        raise pytest.UsageError(
            "--lmcompose-wandb: the package wandb is not installed; pip install 'pytest-lmcompose[wandb]'"
        )
    return Tracking(project, entity, tags)


def _listed(given: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (given or "").split(",") if part.strip())
