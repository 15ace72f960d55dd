"""Track a run on Weights & Biases: summary, tables, and the reports as an artifact. Needs the extra `wandb`."""

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
from pytest_lmcompose.report.view import summarise_gates
from pytest_lmcompose.results import Report

MEASUREMENTS = ("composition", "metric", "value", "stderr", "n", "higher_is_better", "note")
GATES = ("composition", "metric", "gate", "threshold", "value", "passed", "state", "message")
STEPS = ("composition", "step", "method", "category", "seconds", "peak_memory_bytes")
LOGIN_SECONDS = 60
"""Timeout of the login prompt, since nobody may be watching the run."""
ORDERS = ("steps", "metric", "order_free_error", "order_sensitivity", "best")


class Tracker:
    """Plugin that tracks the run; errors are logged and do not fail the run."""

    def __init__(self, tracking: Tracking, log: Callable[[str], None]) -> None:
        self._tracking, self._log = tracking, log

    def pytest_lmcompose_report(self, report: Report, baseline: Report | None) -> None:
        try:
            self._log(f"lmcompose: {track(self._tracking, report, render(report, baseline))}")
        except Exception as error:
            self._log(f"lmcompose: the run could not be tracked on Weights & Biases: {type(error).__name__}: {error}")


def track(tracking: Tracking, report: Report, page: str) -> str:
    """Send a report and its HTML page to a new run of the project; return a message that says where it is.

    Set WANDB_MODE=offline to write to a local folder instead. Raises whatever wandb raises.
    """
    import wandb

    wandb.setup(wandb.Settings(login_timeout=LOGIN_SECONDS))  # must come before init
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        tags=tracking.tags or None,
        job_type="lmcompose",
        config=msgspec.to_builtins({key: getattr(report, key) for key in ("recipe", "environment", "model", "seed")}),
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )
    if run.disabled:
        raise RuntimeError("wandb is disabled: check WANDB_MODE, or log in with `wandb login`")
    try:
        run.summary.update(dict(summary(report)))
        run.log({f"lmcompose/{name}": wandb.Table(list(head), rows) for name, head, rows in tables(report)})
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_text(folder / "report.html", page)
            write(folder / "report.json", report)
            artifact = wandb.Artifact(f"lmcompose-{run.id}", type="lmcompose-report")
            for path in sorted(folder.iterdir()):
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            run.finish(exit_code=int(bool(summarise_gates(report.compositions).failed)))
    except BaseException:
        run.finish(exit_code=1)
        raise
    if run.offline:
        return f"tracked offline in {Path(run.dir).parent}; upload it with `wandb sync`"
    return f"tracked as {run.url}"


def summary(report: Report) -> Iterator[tuple[str, Any]]:
    """Yield the run's summary: gate counts, then every metric of every composition."""
    gates = summarise_gates(report.compositions)
    yield "status", report.status
    yield "gates", gates.judged
    yield "gates_failed", len(gates.failed)
    yield "known_losses", gates.known_losses
    yield "compositions", len(report.compositions)
    yield "compositions_not_measured", len(gates.not_measured)
    for record in report.compositions:
        for measured in record.measurements:
            if measured.value is not None:
                yield f"{record.id}/{measured.metric}", measured.value


def tables(report: Report) -> Iterator[tuple[str, Sequence[str], list[list[Any]]]]:
    """Yield name, header and rows of each table that has rows."""
    records = report.compositions
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
        for e in (() if report.composability is None else report.composability.orders)
    ]
    if rows:
        yield "orders", ORDERS, rows
