"""The front of `lmcompose tune` as a table and as a page."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pytest_lmcompose.report import figures
from pytest_lmcompose.report.html import missing_figures, page
from pytest_lmcompose.report.numbers import MISSING, number
from pytest_lmcompose.report.text import cleaned
from pytest_lmcompose.search.records import Trial, Tuning

_AS_ASKED = "as asked"


def head(tuning: Tuning) -> tuple[str, ...]:
    """Return the headings of `rows`."""
    return "settings", tuning.cost, "least margin", "failed gates", "seconds to build"


def rows(tuning: Tuning, trials: Iterable[Trial]) -> tuple[tuple[str, ...], ...]:
    """Return the cells of trials."""
    return tuple(
        (
            ", ".join(trial.changes) or _AS_ASKED,
            MISSING if (cost := trial.metrics.get(tuning.cost)) is None else number(cost),
            f"{trial.margin:+.3f}",
            trial.error or ", ".join(trial.failed) or "none",
            f"{trial.build_seconds:.1f}",
        )
        for trial in trials
    )


def render(tuning: Tuning) -> str:
    """Return the HTML page of a tuning."""
    tuning = msgspec.convert(cleaned(msgspec.to_builtins(tuning)), Tuning)
    values = [
        {
            "x": trial.metrics[tuning.cost],
            "y": trial.margin,
            "row": ", ".join(trial.changes) or _AS_ASKED,
            "full": number(trial.metrics[tuning.cost]),
            "front": trial in tuning.front,
            "series": _AS_ASKED if trial == tuning.asked else "green" if trial.green else "red",
        }
        for trial in tuning.trials
        if tuning.cost in trial.metrics
    ]
    drawn = figures.front(values, tuning.cost, head(tuning), rows(tuning, tuning.front))
    return page(
        "tuning.html.jinja",
        {} if missing_figures() else {"front": drawn},
        tuning=tuning,
        head=head(tuning),
        rows=rows(tuning, tuning.trials),
    )
