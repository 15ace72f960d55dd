"""The flags for storing and comparing runs. Imports no YAML."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = ".lmcompose"
"""Default folder of stored runs, in pytest's rootdir."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LATEST = "latest"
"""Stands for the latest stored run that passed."""


@dataclass(frozen=True)
class BaselineOptions:
    """The values of the flags."""

    storage: Path
    """Folder of stored runs."""
    save: str | None = None
    """Name to store this run under."""
    autosave: bool = False
    update: bool = False
    """Whether this run becomes the baseline."""
    force: bool = False
    compare: str | None = None
    """Name, number or path of the run to compare with, or `LATEST`; None: only if a gate needs one."""
    fail: tuple[str, ...] = ()
    """Expressions of `thresholds.read_expression`."""
    require: bool = False

    @property
    def stores(self) -> bool:
        """Whether to store this run."""
        return self.save is not None or self.autosave or self.update

    @property
    def compares(self) -> bool:
        """Whether a flag asks for a comparison; thresholds may ask for one too."""
        return self.compare is not None or bool(self.fail) or self.require

    @property
    def wanted(self) -> bool:
        """Whether stored runs are used at all."""
        return self.stores or self.compares


VALUES = (
    ("save", "store the run under this name, as a numbered file", "NAME"),
    ("storage", "folder of stored runs (default: .lmcompose in pytest's rootdir)", "PATH"),
)
"""Name, help and metavar of each flag with a value."""
COMPARE = "compare with this stored run; write the value after = (default: the latest that passed)"
COMPARE_METAVAR = "NAME|NUMBER|PATH"
FAIL = (
    "fail if a metric is worse than in the stored run: [COMPOSITION::]METRIC:LIMIT, globs allowed. LIMIT is 0.01, 5%%, "
    "3se (standard errors), p0.01 (level of a paired test) or n0.02 (evidence that no more is lost) (repeatable)"
)
SWITCHES = (
    ("autosave", "store the run, named after the commit"),
    ("require-baseline", "stop before any work if there is no stored run to compare with"),
    ("update-baseline", "store this run as the new baseline; gates against the old one do not fail"),
    ("force", "update the baseline even with uncommitted files or failed tests"),
)
"""Name and help of each flag without a value."""


def read_baseline_options(
    value: Callable[[str], str | None], switch: Callable[[str], bool], fail: tuple[str, ...], folder: Path, root: Path
) -> BaselineOptions:
    """Read the flags; paths are relative to `folder`, the default storage to `root`. Raises pytest.UsageError."""
    from pytest_lmcompose.report.files import TargetError, check_folder, path_of

    storage = value("storage")
    baselines = BaselineOptions(
        storage=path_of(storage, folder) or root / FOLDER,
        save=value("save"),
        autosave=switch("autosave"),
        update=switch("update-baseline"),
        force=switch("force"),
        compare=value("compare"),
        fail=fail,
        require=switch("require-baseline"),
    )
    if baselines.save is not None and (not NAME.fullmatch(baselines.save) or baselines.save == LATEST):
        raise pytest.UsageError(
            f"--lmcompose-save: expected letters, digits, dots, - and _, but not {LATEST!r}; found {baselines.save!r}"
        )
    if baselines.update and (baselines.save is not None or baselines.autosave):
        raise pytest.UsageError(
            "--lmcompose-update-baseline stores the run already: remove --lmcompose-save or --lmcompose-autosave"
        )
    if baselines.force and not baselines.update:
        raise pytest.UsageError("--lmcompose-force requires --lmcompose-update-baseline")
    try:
        check_folder(baselines.storage)
    except TargetError as error:
        raise pytest.UsageError(f"--lmcompose-storage: {error}") from None
    if fail:
        from pytest_lmcompose.gate.thresholds import ThresholdError, read_expression

        try:
            for text in fail:
                read_expression(text)
        except ThresholdError as error:
            raise pytest.UsageError(f"--lmcompose-compare-fail: {error}") from None
    return baselines
