"""Choose the stored run to compare with, compare, and store the new run. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_lmcompose.baseline.compare import ComparedReports, compare_reports
from pytest_lmcompose.baseline.drift import LEVEL, WINDOW, drifts
from pytest_lmcompose.baseline.git import changes, commit
from pytest_lmcompose.baseline.options import LATEST, BaselineOptions
from pytest_lmcompose.baseline.reference import Baseline
from pytest_lmcompose.baseline.storage import Storage, StorageError, passed, read_run
from pytest_lmcompose.results import Comparison, Drift, DriftRow, Report, Stored
from pytest_lmcompose.results import replace as changed

_NEW_NAME = "baseline"
_READ = 3 * WINDOW
"""Number of stored runs that are searched for passed ones."""
_SHOWN = 5


def choose(baselines: BaselineOptions, folder: Path, *, needed: bool) -> Baseline | None:
    """Return the stored run to compare with, None if none is wanted or available.

    `needed` is whether a gate compares with it. Raises StorageError if the run is broken, or if a run that was named or
    required is missing.
    """
    if not (baselines.compares or needed or baselines.update):
        return None
    storage = Storage(baselines.storage)
    if baselines.compare not in (None, LATEST):
        assert baselines.compare is not None
        if (folder / baselines.compare).is_dir():
            raise StorageError(
                f"--lmcompose-compare: {baselines.compare!r} is a folder, not a stored run; to test that folder, write "
                f"--lmcompose-compare={LATEST} before it"
            )
        return Baseline.read(storage.find(baselines.compare, folder))
    path, failed = storage.latest()
    if path is not None:
        return replace(Baseline.read(path), passed_over=tuple(map(str, failed)))
    if baselines.require or (baselines.compares and not baselines.stores):
        flag = "--lmcompose-require-baseline" if baselines.require else "nothing to compare with"
        raise StorageError(
            f"{flag}: no run that passed is stored in {baselines.storage}; store one with "
            "--lmcompose-save=NAME or --lmcompose-update-baseline"
        )
    return None


def check_tree(baselines: BaselineOptions, folder: Path) -> None:
    """Raise StorageError if a new baseline would depend on uncommitted files."""
    if not baselines.update or baselines.force:
        return
    if dirty := changes(folder, baselines.storage):
        named = ", ".join(dirty[:_SHOWN]) + (", ..." if len(dirty) > _SHOWN else "")
        raise StorageError(
            f"--lmcompose-update-baseline: {len(dirty)} file{'s are' if len(dirty) > 1 else ' is'} not committed, so "
            f"the baseline could not be reproduced: {named}. Commit or ignore them, or add --lmcompose-force"
        )


@dataclass(frozen=True)
class Outcome:
    """The comparison of a run with stored ones."""

    baseline: Baseline | None = None
    compared: ComparedReports | None = None
    drift: tuple[DriftRow, ...] = ()
    """All metrics that were tested for drift."""
    runs: int = 0
    """Number of runs tested for drift, including this one."""
    problems: tuple[str, ...] = ()

    def added_to(self, report: Report) -> Report:
        """Return `report` with the comparison and the drift."""
        comparison = drift = None
        if self.baseline is not None and self.compared is not None:
            old = self.baseline.report
            comparison = Comparison(
                self.baseline.path.name,
                old.started,
                old.seed,
                None if old.stored is None else old.stored.commit,
                self.compared.problem,
                self.compared.differences,
                self.compared.rows,
            )
        if self.drift:
            drift = Drift(self.runs, LEVEL, len(self.drift), tuple(row for row in self.drift if row.drifts))
        return changed(report, comparison=comparison, drift=drift)


def outcome(
    report: Report, baseline: Baseline | None, baselines: BaselineOptions, judged: Callable[[str, str], bool]
) -> Outcome:
    """Compare a finished run with its baseline, and test its gated metrics for drift over the stored runs.

    `judged` returns whether a composition and metric has a gate.
    """
    compared = None if baseline is None else compare_reports(baseline.report, report)
    if baseline is None and not baselines.wanted:
        return Outcome()
    before, problems = _history(Storage(baselines.storage))
    found = drifts([*before, report], judged=judged)
    return Outcome(baseline, compared, tuple(found), len(before) + 1, tuple(problems))


def keep(report: Report, baselines: BaselineOptions, baseline: Baseline | None, root: Path, *, ok: bool) -> str | None:
    """Store a run as the flags ask; return a line for the user, None if nothing was asked. Raises OSError."""
    if not baselines.stores:
        return None
    if report.status != "finished":
        return "lmcompose: the run was interrupted and is not stored"
    if not any(record.status == "measured" for record in report.compositions):
        return "lmcompose: the run measured nothing and is not stored"
    if baselines.update and not ok and not baselines.force:
        return "lmcompose: the baseline is not updated because tests failed; fix them, or add --lmcompose-force"
    head = commit(root)
    if baselines.update:
        name = _NEW_NAME if baseline is None else _name_of(baseline)
    else:
        name = baselines.save or f"auto-{head[:8]}" if head else baselines.save or "auto"
    how = "update" if baselines.update else "save" if baselines.save else "autosave"
    stored = Stored(name, how, ok, head, bool(head and changes(root, baselines.storage)))  # type: ignore[arg-type]
    kept = changed(report, prompts=(), comparison=None, drift=None, stored=stored)
    path = Storage(baselines.storage).save(kept, name)
    return f"lmcompose: the run is stored as {path}" + ("" if ok else " and marked as failed")


def _history(storage: Storage) -> tuple[list[Report], list[str]]:
    """Return the last passed runs, the oldest first, and the problems with broken ones."""
    found: list[Report] = []
    problems = []
    for run in reversed(storage.runs()[-_READ:]):
        try:
            report = read_run(run.path)
        except StorageError as error:
            problems.append(f"lmcompose: left out of the history: {error}")
            continue
        if passed(report):
            found.append(report)
        if len(found) == WINDOW - 1:
            break
    return found[::-1], problems


def _name_of(baseline: Baseline) -> str:
    """Return the name for the run that replaces a baseline."""
    stored = baseline.report.stored
    return _NEW_NAME if stored is None or stored.how == "autosave" else stored.name
