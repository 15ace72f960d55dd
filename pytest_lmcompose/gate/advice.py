"""Suggest what to try if a gate fails, one line for all metrics with the same advice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from evaluators.metrics import find_metric


def advice(failed: Iterable[tuple[str, bool | None]]) -> Iterator[str]:
    """Yield advice on failed metrics, given as (name, whether higher is better if known)."""
    lines: dict[str, set[str]] = {}
    for metric, higher_is_better in failed:
        line = find_metric(metric, higher_is_better=higher_is_better).advice or "see docs/gates.md"
        lines.setdefault(line, set()).add(metric)
    for line, metrics in lines.items():
        yield f"{', '.join(sorted(metrics))}: {line}"
