"""Content that the HTML, Markdown and JUnit reports share: gate summaries, headline metrics, changed samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evaluators.metrics import find_metric
from pytest_lmcompose.baseline.compare import ComparedReports, compare_reports
from pytest_lmcompose.report.layout import shown_metrics
from pytest_lmcompose.results import CompositionResult, DriftRow, Gate, Outcome, Report, Row
from pytest_lmcompose.texts import counted

TOLERANCE = 1e-9
"""Smaller changes of a sample are ignored."""


@dataclass(frozen=True)
class GateSummary:
    """Outcome of the gates of a run or a composition."""

    failed: tuple[tuple[str, Gate], ...]
    """Pairs of composition and gate."""
    judged: int
    """Number of gates, known losses excluded."""
    not_measured: tuple[tuple[str, str], ...]
    """Pairs of composition and reason."""
    known_losses: int = 0
    """Number of broken promises that the thresholds accept (`lost: REASON`)."""

    @property
    def failure_messages(self) -> list[tuple[str, str]]:
        """Pairs of composition and message, for everything that failed."""
        missing = [(name, f"was not measured: {reason}") for name, reason in self.not_measured]
        return missing + [(name, gate.message.removeprefix(name).strip()) for name, gate in self.failed]

    @property
    def state(self) -> Literal["failed", "lost", "passed", "not judged"]:
        """The worst outcome: a failure, then a known loss, then a pass."""
        if self.failed or self.not_measured:
            return "failed"
        if self.known_losses:
            return "lost"
        return "passed" if self.judged else "not judged"

    @property
    def gate_counts(self) -> str:
        """Counts of failed gates and known losses in words; empty without gates."""
        counts = [f"{len(self.failed)} of {self.judged} failed"] if self.failed else []
        if self.judged and not self.failed:
            counts = [f"{self.judged} passed"]
        if self.known_losses:
            counts.append(counted(self.known_losses, "known loss"))
        return ", ".join(counts)

    @property
    def summary(self) -> str:
        """The outcome in words."""
        parts = []
        if self.not_measured:
            parts.append(f"{counted(len(self.not_measured), 'composition')} not measured")
        if self.failed:
            parts.append(f"{len(self.failed)} of {counted(self.judged, 'gate')} failed")
        elif self.judged:
            parts.append("the gate passed" if self.judged == 1 else f"all {self.judged} gates passed")
        elif not self.known_losses:
            parts.append("no gate judged anything")
        if self.known_losses:
            parts.append(counted(self.known_losses, "known loss"))
        return ", ".join(parts)


@dataclass(frozen=True)
class ChangedSample:
    """One sample with a different outcome than before."""

    label: str
    before: str
    after: str
    better: bool


@dataclass(frozen=True)
class ChangedSamples:
    """The changed samples of a metric, the worst first."""

    metric: str
    n: int
    better: int
    worse: int
    shown: tuple[ChangedSample, ...]


@dataclass(frozen=True)
class BaselineComparison:
    """The comparison of a run with a stored one."""

    name: str
    started: str
    compared: ComparedReports

    @property
    def changed(self) -> list[Row]:
        """The rows that changed, the worst verdicts first."""
        order = ("worse", "gone", "changed", "better")
        return sorted((r for r in self.compared.rows if r.verdict in order), key=lambda r: order.index(r.verdict))

    def changed_first(self, metrics: Sequence[str]) -> list[Row]:
        """Return the changed rows, then the unchanged rows of `metrics`."""
        changed = self.changed
        return changed + [row for row in self.compared.rows if row.metric in metrics and row not in changed]


def compare_with_baseline(report: Report, baseline: Report | None) -> BaselineComparison | None:
    """Return the comparison with `baseline`, or the one stored in the report if it has the same baseline."""
    stored = report.comparison
    if stored is not None and (baseline is None or baseline.started == stored.started):
        compared = ComparedReports(stored.problem, stored.differences, stored.rows)
        return BaselineComparison(stored.baseline, stored.started, compared)
    if baseline is None:
        return None
    return BaselineComparison("the baseline", baseline.started, compare_reports(baseline, report))


def drifting(report: Report) -> tuple[DriftRow, ...]:
    """Return the metrics that drift: they keep getting worse over the stored runs."""
    return () if report.drift is None else tuple(row for row in report.drift.rows if row.drifts)


def summarise_gates(records: Sequence[CompositionResult]) -> GateSummary:
    """Summarise the gates of `records`."""
    failed = tuple((r.id, gate) for r in records for gate in r.gates if not gate.passed)
    not_measured = tuple((r.id, r.error or r.status) for r in records if r.status in ("failed", "interrupted"))
    lost = sum(gate.state == "lost" for record in records for gate in record.gates)
    return GateSummary(failed, sum(len(r.gates) for r in records) - lost, not_measured, lost)


def headline_metrics(records: Sequence[CompositionResult], *, judged: bool = False) -> list[str]:
    """Return the metrics for summaries: judged by a gate or marked `headline`; all metrics if there are none.

    With `judged`, return only metrics that a gate judged, if there are any.
    """
    if judged and any(record.gates for record in records):
        return shown_metrics(records, lambda _: False)
    named = shown_metrics(records, lambda metric: find_metric(metric).headline)
    return named or shown_metrics(records, lambda _: True)


def changed_samples(
    before: CompositionResult, after: CompositionResult, metrics: Sequence[str], report: Report, most: int
) -> list[ChangedSamples]:
    """Return the samples that differ between two results, by metric, with at most `most` shown for each."""
    old_metrics, new_metrics = before.by_metric, after.by_metric
    texts = {(p.seed, metric): p.texts for p in report.prompts for metric in p.metrics}
    found = []
    for metric in metrics:
        if metric not in old_metrics or metric not in new_metrics or new_metrics[metric].note.endswith("not sampled"):
            continue  # read from the weights, such as bits per layer
        old, new = old_metrics[metric].runs, new_metrics[metric].runs
        if [len(run.samples) for run in old] != [len(run.samples) for run in new]:
            continue
        changes = []
        for one, other in zip(old, new, strict=True):
            seed = new_metrics[metric].seed_of(other, report.seed)
            labels = texts.get((seed, metric), ())
            several = f", seed {seed}" if len(new) > 1 else ""
            for i, (x, y) in enumerate(zip(one.samples, other.samples, strict=True)):
                gain = _gain(x, y, higher_is_better=new_metrics[metric].higher_is_better)
                if abs(gain) > TOLERANCE:
                    label = labels[i] if i < len(labels) else f"sample {i + 1}"
                    sample = ChangedSample(label + several, _answer(one, i, x), _answer(other, i, y), gain > 0)
                    changes.append((gain, sample))
        changes.sort(key=lambda change: change[0])
        better = sum(sample.better for _, sample in changes)
        n = sum(len(run.samples) for run in new)
        if changes:
            shown = tuple(sample for _, sample in changes[:most])
            found.append(ChangedSamples(metric, n, better, len(changes) - better, shown))
    return found


def _gain(before: float | None, after: float | None, *, higher_is_better: bool) -> float:
    """Return the improvement of a sample; None means not finite, which is worse than any number."""
    if before is None or after is None:
        return 0.0 if before is after else math.inf if before is None else -math.inf
    return (after - before) * (1 if higher_is_better else -1)


def _answer(run: Outcome, index: int, value: float | None) -> str:
    """Return the model's answer, if stored, with the outcome."""
    outcome = "not finite" if value is None else f"{value:.3g}"
    return f"{run.answers[index]} ({outcome})" if index < len(run.answers) else outcome
