"""Judge an evaluation log by an earlier one: pair the samples, and apply expressions as to stored runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from evaluators.measurement import Measurement, exp
from pytest_lmcompose.baseline.compare import compare_metric, compare_reports, with_verdicts
from pytest_lmcompose.baseline.reference import Baseline, Circumstances
from pytest_lmcompose.gate.judge import Reference, judge, settle
from pytest_lmcompose.gate.thresholds import BASELINE, Rule
from pytest_lmcompose.logs.log import Log, LogError, Metric
from pytest_lmcompose.results import Gate, Measured, Report, Row
from pytest_lmcompose.texts import counted


@dataclass(frozen=True)
class Judged:
    """The metrics of two logs, and the verdicts on the later one."""

    rows: tuple[Row, ...]
    """Each metric of both, with two-sided tests."""
    gates: tuple[Gate, ...]
    gone: tuple[str, ...]
    """Metrics, or compositions of reports, that only the earlier one has."""
    left_out: int
    """Samples that only one of the logs has, over all metrics."""


def judge_logs(old: Log, new: Log, rules: Sequence[Rule], *, common: bool = False, any_prompt: bool = False) -> Judged:
    """Judge `new` by `old`; with `common`, by the samples that both have.

    Raises LogError for samples that only one log has, for prompts that differ unless `any_prompt`, and for a rule that
    no metric matches.
    """
    pairs = [
        _paired(old, new, name, common=common, any_prompt=any_prompt)
        for name in sorted(old.metrics.keys() & new.metrics.keys())
    ]
    names = [pair.new.metric for pair in pairs]
    if not pairs:
        raise LogError(f"{old.path} and {new.path} have no metric in common: {_some(old)}; {_some(new)}")
    for rule in rules:
        if not any(map(rule.judges, names)):
            raise LogError(f"{rule.source!r} matches no metric of both logs: {', '.join(names)}")
    before, after = [pair.old for pair in pairs], [pair.new for pair in pairs]
    known = {BASELINE: Reference(old.path, before, [before])}
    judged = judge(rules, new.path, after, known, runs=[after], task_of=lambda metric: metric.partition("/")[0])
    gates = settle({new.path: judged})[new.path]
    rows = [compare_metric(new.path, Measured.of(pair.old), Measured.of(pair.new)) for pair in pairs]
    gone = tuple(sorted(old.metrics.keys() - new.metrics.keys()))
    return Judged(tuple(with_verdicts(rows)), gates, gone, sum(pair.left_out for pair in pairs))


def judge_reports(old: Baseline, new: Report, rules: Sequence[Rule]) -> Judged:
    """Judge each composition of the report `new` by the same one of another report.

    Raises LogError for reports without a composition in common, of other models, and for a rule that no metric matches.
    """
    compared = compare_reports(old.report, new)
    if compared.problem is not None:
        raise LogError(f"{old.name} cannot be compared: {compared.problem}")
    if any(m.partial for report in (old.report, new) for record in report.compositions for m in record.measurements):
        raise LogError("one of the reports has questions that were asked in part, with --lmcompose-sequential")
    known = old.report.by_id
    both = [record for record in new.compositions if record.id in known and record.measurements]
    if not both:
        raise LogError(f"{old.name} has no composition of this report that was measured")
    for rule in rules:
        if not any(rule.covers(record.id) and any(map(rule.judges, record.by_metric)) for record in both):
            raise LogError(f"{rule.source!r} matches no metric of both reports")
    found = {}
    for record in both:
        reference = old.reference(record.id, Circumstances(new.model, record.data or {}, new.seeds))
        measured = [m.measurement() for m in record.measurements]
        found[record.id] = judge(rules, record.id, measured, {BASELINE: reference}, runs=record.runs)
    gates = [gate for gates in settle(found).values() for gate in gates]
    rows = tuple(row for row in compared.rows if row.verdict != "gone")
    gone = tuple(name for name in known if name not in new.by_id)
    return Judged(rows, tuple(gates), gone, 0)


class _Pair(NamedTuple):
    """A metric of both logs over the same samples."""

    old: Measurement
    new: Measurement
    left_out: int


def _paired(old: Log, new: Log, name: str, *, common: bool, any_prompt: bool) -> _Pair:
    """Return a metric of both logs over the same samples, in the order of the earlier log."""
    one, other = old.metrics[name], new.metrics[name]
    before, after = one.means(), other.means()
    shared = list(before) if before.keys() == after.keys() else [sample for sample in before if sample in after]
    left_out = len(before) + len(after) - 2 * len(shared)
    if not shared or (left_out and not common):
        raise LogError(
            f"{name}: {len(before) - len(shared)} samples are only in {old.path}, "
            f"{len(after) - len(shared)} only in {new.path}, {len(shared)} in both"
            + ("; to judge by those in both, add --common" if shared else "")
        )
    if not any_prompt and (one.samples, one.prompts) != (other.samples, other.prompts):
        asked, ask = one.asked(), other.asked()
        if differ := [sample for sample in shared if asked.get(sample) and ask.get(sample) not in (asked[sample], "")]:
            raise LogError(
                f"{name}: {len(differ)} of {counted(len(shared), 'sample')} had another prompt in {new.path} than in "
                f"{old.path}, such as sample {differ[0]}; to pair them all the same, add --any-prompt"
            )
    if one.higher_is_better != other.higher_is_better:
        raise LogError(f"{name}: higher is better in one of the logs, lower in the other")
    return _Pair(_measured(one, before, shared), _measured(other, after, shared), left_out)


def _measured(metric: Metric, values: Mapping[str, float], samples: Sequence[str]) -> Measurement:
    """Return the metric over samples."""
    units = dict(zip(metric.samples, metric.weights, strict=False))
    weights = [units[sample] for sample in samples] if len(set(metric.weights)) > 1 else []
    found = Measurement.mean(
        metric.name,
        list(map(values.__getitem__, samples)),
        higher_is_better=metric.higher_is_better,
        weights=weights,
    )
    if not metric.exponential:
        return found
    value = exp(found.value)
    return replace(found, value=value, stderr=None if found.stderr is None else value * found.stderr)


def _some(log: Log) -> str:
    names = list(log.metrics)
    return f"{log.path} has {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "")
