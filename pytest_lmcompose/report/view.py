"""What every report for people says of a document: verdicts in words, headline metrics, samples that changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluators.metrics import find_metric
from pytest_lmcompose.baseline.compare import ComparedReports, compare_reports
from pytest_lmcompose.report.layout import shown_metrics
from pytest_lmcompose.report.numbers import counted
from pytest_lmcompose.results import CompositionResult, DriftRow, Gate, Outcome, Report, Row

SMALLEST = 1e-9
"""A sample that changed by less is the same one."""


@dataclass(frozen=True)
class Verdicts:
    """How the gates of a run, or of a composition, came out."""

    failed: tuple[tuple[str, Gate], ...]
    """Composition and gate."""
    gates: int
    """Without those of losses that are accepted."""
    broken: tuple[tuple[str, str], ...]
    """Compositions that were not measured, and why."""
    lost: int = 0
    """Promises that are lost, as the thresholds say."""

    @property
    def told(self) -> list[tuple[str, str]]:
        """What failed, in words: compositions and what to say of them."""
        broken = [(name, f"was not measured: {why}") for name, why in self.broken]
        return broken + [(name, gate.message.removeprefix(name).strip()) for name, gate in self.failed]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, which takes a gate."""
        return not self.failed and not self.broken and self.gates > 0

    @property
    def words(self) -> str:
        """The outcome in words."""
        found = []
        if self.broken:
            found.append(f"{counted(len(self.broken), 'composition')} not measured")
        if self.failed:
            found.append(f"{len(self.failed)} of {counted(self.gates, 'gate')} failed")
        elif self.gates:
            found.append("the gate passed" if self.gates == 1 else f"all {self.gates} gates passed")
        else:
            found.append("no gate judged anything")
        if self.lost:
            found.append(counted(self.lost, "promise") + " known to be lost")
        return ", ".join(found)


@dataclass(frozen=True)
class ChangedSample:
    """One sample whose outcome is another one than before."""

    label: str
    before: str
    after: str
    better: bool


@dataclass(frozen=True)
class ChangedSamples:
    """The samples of a metric that changed, those that got worse most first."""

    metric: str
    n: int
    better: int
    worse: int
    shown: tuple[ChangedSample, ...]


@dataclass(frozen=True)
class Against:
    """A run held against a stored one."""

    name: str
    started: str
    found: ComparedReports

    @property
    def changed(self) -> list[Row]:
        """What got worse, or lost, then what got better."""
        order = ("worse", "gone", "changed", "better")
        return sorted((r for r in self.found.rows if r.verdict in order), key=lambda r: order.index(r.verdict))

    def first(self, metrics: Sequence[str]) -> list[Row]:
        """Return what changed, then what did not of some metrics."""
        changed = self.changed
        return changed + [row for row in self.found.rows if row.metric in metrics and row not in changed]


def against(document: Report, baseline: Report | None) -> Against | None:
    """Return the comparison with `baseline`; without one that which the run itself made, if it did."""
    told = document.comparison
    if told is not None and (baseline is None or baseline.started == told.started):
        return Against(told.baseline, told.started, ComparedReports(told.problem, told.differences, told.rows))
    if baseline is None:
        return None
    return Against("the baseline", baseline.started, compare_reports(baseline, document))


def drifting(document: Report) -> tuple[DriftRow, ...]:
    """Return the metrics that got worse and worse over the stored runs."""
    return () if document.drift is None else tuple(row for row in document.drift.rows if row.drifts)


def verdicts(records: Sequence[CompositionResult]) -> Verdicts:
    """Return how the gates of `records` came out."""
    failed = tuple((r.id, gate) for r in records for gate in r.gates if not gate.passed)
    broken = tuple((r.id, r.error or r.status) for r in records if r.status in ("failed", "interrupted"))
    lost = sum(gate.state == "lost" for record in records for gate in record.gates)
    return Verdicts(failed, sum(len(r.gates) for r in records) - lost, broken, lost)


def headline_metrics(records: Sequence[CompositionResult], *, judged: bool = False) -> list[str]:
    """Return the metrics that gates judged and those that steps promise something of; all, where there are none.

    With `judged` only those that gates judged, where there are any.
    """
    if judged and any(record.gates for record in records):
        return shown_metrics(records, lambda _: False)
    named = shown_metrics(records, lambda metric: find_metric(metric).headline)
    return named or shown_metrics(records, lambda _: True)


def changed_samples(
    before: CompositionResult, after: CompositionResult, metrics: Sequence[str], document: Report, most: int
) -> list[ChangedSamples]:
    """Return what changed between two records of compositions, by metric: `most` samples of each are shown."""
    was, now = before.by_metric, after.by_metric
    texts = {(p.seed, metric): p.texts for p in document.prompts for metric in p.metrics}
    found = []
    for metric in metrics:
        if metric not in was or metric not in now or now[metric].note.endswith("not sampled"):
            continue  # samples that were read, such as bits by layer, are no answers
        old, new = was[metric].runs, now[metric].runs
        if [len(run.samples) for run in old] != [len(run.samples) for run in new]:
            continue
        changes = []
        for one, other in zip(old, new, strict=True):
            seed = now[metric].seed_of(other, document.seed)
            labels = texts.get((seed, metric), ())
            several = f", seed {seed}" if len(new) > 1 else ""
            for i, (x, y) in enumerate(zip(one.samples, other.samples, strict=True)):
                gain = _gain(x, y, higher_is_better=now[metric].higher_is_better)
                if abs(gain) > SMALLEST:
                    label = labels[i] if i < len(labels) else f"sample {i + 1}"
                    sample = ChangedSample(label + several, _said(one, i, x), _said(other, i, y), gain > 0)
                    changes.append((gain, sample))
        changes.sort(key=lambda change: change[0])
        better = sum(sample.better for _, sample in changes)
        n = sum(len(run.samples) for run in new)
        if changes:
            shown = tuple(sample for _, sample in changes[:most])
            found.append(ChangedSamples(metric, n, better, len(changes) - better, shown))
    return found


def _gain(before: float | None, after: float | None, *, higher_is_better: bool) -> float:
    """Return by how much a sample got better; one that is not finite any more is as bad as can be."""
    if before is None or after is None:
        return 0.0 if before is after else math.inf if before is None else -math.inf
    return (after - before) * (1 if higher_is_better else -1)


def _said(run: Outcome, place: int, value: float | None) -> str:
    """Return the outcome of a sample, after what the model said where that was kept."""
    return f"{run.answers[place]} ({_outcome(value)})" if place < len(run.answers) else _outcome(value)


def _outcome(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
