"""A run on Weights & Biases: summary keys, tables, and the page as an artifact. Needs the extra `wandb`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pytest_lmcompose.report.collect import write
from pytest_lmcompose.report.files import write_text
from pytest_lmcompose.report.html import render
from pytest_lmcompose.report.options import Tracking
from pytest_lmcompose.report.view import verdicts
from pytest_lmcompose.results import Report

MEASUREMENTS = ("composition", "metric", "value", "stderr", "n", "higher_is_better", "note")
GATES = ("composition", "metric", "gate", "threshold", "value", "passed", "message")
STEPS = ("composition", "step", "method", "category", "seconds", "peak_memory_bytes")
LOGIN_SECONDS = 60
"""How long it may ask for a key at the end of a run that nobody may be watching."""
ORDERS = ("steps", "metric", "order_free_error", "order_sensitivity", "best")


class Tracker:
    """The plugin that tracks the run. What goes wrong is told, and no more: the run is as good without it."""

    def __init__(self, tracking: Tracking, tell: Callable[[str], None]) -> None:
        self._tracking, self._tell = tracking, tell

    def pytest_lmcompose_report(self, report: Report, baseline: Report | None) -> None:
        try:
            self._tell(f"lmcompose: {track(self._tracking, report, render(report, baseline))}")
        except Exception as error:
            self._tell(f"lmcompose: the run could not be tracked on Weights & Biases: {type(error).__name__}: {error}")


def track(tracking: Tracking, document: Report, page: str) -> str:
    """Send a report document and its page to a new run of the project; return where it is, in words.

    Without a network it takes WANDB_MODE=offline, which writes to a folder. Whatever goes wrong is raised.
    """
    import wandb

    wandb.setup(wandb.Settings(login_timeout=LOGIN_SECONDS))  # which it reads before those of the run
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        tags=tracking.tags or None,
        job_type="lmcompose",
        config=msgspec.to_builtins({key: getattr(document, key) for key in ("recipe", "environment", "model", "seed")}),
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )
    if run.disabled:
        raise RuntimeError("it is disabled, by WANDB_MODE or since nobody is logged in; see `wandb login`")
    try:
        run.summary.update(dict(summary(document)))
        run.log({f"lmcompose/{name}": wandb.Table(list(head), rows) for name, head, rows in tables(document)})
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_text(folder / "report.html", page)
            write(folder / "report.json", document)
            artifact = wandb.Artifact(f"lmcompose-{run.id}", type="lmcompose-report")
            for path in sorted(folder.iterdir()):
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            run.finish(exit_code=int(bool(verdicts(document.compositions).failed)))
    except BaseException:
        run.finish(exit_code=1)
        raise
    if run.offline:
        return f"tracked offline in {Path(run.dir).parent}; send it by wandb sync"
    return f"tracked as {run.url}"


def summary(document: Report) -> Iterator[tuple[str, Any]]:
    """Yield the run's summary: how gates came out, then every metric of every composition."""
    found = verdicts(document.compositions)
    yield "status", document.status
    yield "gates", found.gates
    yield "gates_failed", len(found.failed)
    yield "compositions", len(document.compositions)
    yield "compositions_not_measured", len(found.broken)
    for record in document.compositions:
        for measured in record.measurements:
            if measured.value is not None:
                yield f"{record.id}/{measured.metric}", measured.value


def tables(document: Report) -> Iterator[tuple[str, Sequence[str], list[list[Any]]]]:
    """Yield name, head and rows of each table that has any."""
    records = document.compositions
    of_records = (("measurements", MEASUREMENTS), ("gates", GATES), ("steps", STEPS))
    for name, head in of_records:
        rows = [
            [record.id, *(getattr(entry, "id" if key == "step" else key) for key in head[1:])]
            for record in records
            for entry in getattr(record, name)
        ]
        if rows:
            yield name, head, rows
    rows = [
        [" & ".join(e.steps), e.metric, *(getattr(getattr(e, kind), "value", None) for kind in ORDERS[2:4]), e.best]
        for e in (() if document.composability is None else document.composability.orders)
    ]
    if rows:
        yield "orders", ORDERS, rows
