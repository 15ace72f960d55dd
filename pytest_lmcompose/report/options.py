"""Flags of the HTML, Markdown, LaTeX and W&B reports, and of the terminal table; imports no report library."""

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
    """Weights & Biases project, owner and tags of a run."""

    project: str
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Columns and order of the terminal table."""

    columns: tuple[str, ...] = ()
    """Globs of metrics in column order; empty: metrics with a threshold."""
    sort: str | None = None
    """A metric, best first, or `id`; a leading `-` reverses. None: in test order."""
    group: str | None = None
    """Group rows by `category` of their steps, or by their `first` step."""


@dataclass(frozen=True)
class Outputs:
    """Reports to write, with their paths."""

    html: Path | None = None
    markdown: Path | None = None
    latex: Path | None = None
    layout: Layout = Layout()
    tracking: Tracking | None = None
    github: bool = False
    """Whether to annotate failures and add to the job summary of GitHub Actions."""

    @property
    def files(self) -> dict[str, Path]:
        """Output paths by flag."""
        named = {"html": self.html, "markdown": self.markdown, "latex": self.latex}
        return {f"--lmcompose-{name}": path for name, path in named.items() if path is not None}

    @property
    def wanted(self) -> bool:
        """Whether any report is wanted."""
        return bool(self.files) or self.tracking is not None


FLAGS = (
    ("html", "write the report as one HTML page to this file (figures need the extra html)", "PATH"),
    ("markdown", "append a summary to this file, such as the job summary of a CI service", "PATH"),
    ("latex", "write tables of order-free error and order sensitivity to this file", "PATH"),
    (
        "columns",
        "metrics of the terminal's table, as comma-separated globs (default: those with a threshold)",
        "GLOBS",
    ),
    ("sort", "sort the terminal's table by a metric, best first, or by id; -METRIC: worst first", "METRIC"),
    ("group", "group the terminal's table by category, or by first step (first)", "HOW"),
    ("wandb", "track the run in this Weights & Biases project (needs the extra wandb)", "PROJECT"),
    ("wandb-entity", "user or team that owns the project (default: you)", "NAME"),
    ("wandb-tags", "comma-separated tags of the tracked run", "TAGS"),
)
"""Name, help and metavar of each flag with a value."""


def read_outputs(value: Callable[[str], str | None], folder: Path, *, github: bool = False) -> Outputs:
    """Read the flags; `value` returns the value of one, and relative paths are relative to `folder`.

    Raises pytest.UsageError for invalid values.
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
        github=github,
    )


def _tracking(value: Callable[[str], str | None]) -> Tracking | None:
    project, entity, tags = value("wandb"), value("wandb-entity"), _listed(value("wandb-tags"))
    if project is None:
        for flag, given in (("entity", entity), ("tags", tags)):
            if given:
                raise pytest.UsageError(f"--lmcompose-wandb-{flag}: needs --lmcompose-wandb=PROJECT")
        return None
    # Offline runs leave a folder `wandb`, which looks like a package without an origin.
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        raise pytest.UsageError(
            "--lmcompose-wandb: the package wandb is not installed; pip install 'pytest-lmcompose[wandb]'"
        )
    return Tracking(project, entity, tags)


def _listed(given: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (given or "").split(",") if part.strip())
