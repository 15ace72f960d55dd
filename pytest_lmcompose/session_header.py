"""Header and footer lines: the tested model, the stored run to compare with, how to resume."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from pytest_lmcompose.failures import usage_errors

if TYPE_CHECKING:
    from pytest_lmcompose.session import Session


def header(session: Session) -> list[str]:
    """Return the header lines: the shard, the resumed run, the stored run."""
    shard = [] if session.options.shard is None else [f"lmcompose: shard {session.options.shard}"]
    return [*shard, *_resumed(session), *_compared(session)]


def announced(session: Session) -> list[str]:
    """Return the line after collection: the number of compositions, the model and the world."""
    tested = dict.fromkeys(session.expected)
    if not tested or session.options.plan or session.config.option.verbose < 0:
        return []
    with usage_errors():
        recipe, location = session.run.recipe, session.run.location
    count = f"{len(tested)} composition{'s' * (len(tested) != 1)}"
    where = "" if location == recipe.model.path else f" ({location})"
    return [f"lmcompose: {count} of the model {recipe.model.path}{where}, on the world {recipe.world_name}"]


def _compared(session: Session) -> list[str]:
    if not session.options.baselines.compares:
        return []
    baseline = session.run.baseline
    if baseline is None:
        return ["lmcompose: there is no stored run to compare with yet"]
    failed = f"; skipped failed runs: {', '.join(baseline.passed_over)}" if baseline.passed_over else ""
    return [f"lmcompose: comparing with {baseline.path} of {baseline.report.started}{failed}"]


def _resumed(session: Session) -> list[str]:
    if not session.options.resume:
        return []
    with usage_errors():
        journal = session.run.journal
    left = journal.interrupted() if journal is not None else None
    if left is None:
        return ["lmcompose: no interrupted run with these options; results in the cache are reused"]
    began = datetime.datetime.fromtimestamp(left.began).isoformat(" ", "seconds")
    return [f"lmcompose: resuming the run of {began}: {len(left.finished)} compositions had finished"]


def how_to_resume(session: Session) -> str:
    """Return how to resume a stopped run."""
    if session.options.cache_dir is None:
        return "lmcompose: stopped; nothing was kept, so it cannot be resumed: run it without --lmcompose-no-cache"
    return "lmcompose: stopped; add --lmcompose-resume to the same command to go on"
