"""Compare two reports: their model, data, seed, settings and versions, and every metric. Imports no pytest.

    found = compare_reports(read_run(old), read_run(new))  # read_run is in `storage`
    found.problem         # why the reports cannot be compared, or None
    found.differences     # in model, data, seed, settings and versions
    found.rows            # one per composition and metric, paired on the samples

The p of a row is two-sided and tests for any change; `p_holm` is corrected for all rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.measurement import EvaluationError
from evaluators.metrics import find_metric
from pytest_lmcompose.data.hashes import METHODS, data_part
from pytest_lmcompose.gate.paired import change, corrected, is_exact
from pytest_lmcompose.results import Compared, Difference, Measured, Model, Report, Row, Step, replace

LEVEL = 0.05
_MODEL = {"id": "name", "revision": "revision", "weight_hash": "weights", "dtype": "dtype", "device": "device"}
_SHOWN = 12
"""Characters of a hash that messages show."""


@dataclass(frozen=True)
class ComparedReports:
    """The result of comparing two reports."""

    problem: str | None
    """Why the reports cannot be compared; then there are no rows."""
    differences: tuple[Difference, ...]
    rows: tuple[Row, ...]


def compare_reports(old: Report, new: Report, *, level: float = LEVEL) -> ComparedReports:
    """Compare two reports; a row is worse or better at `level` after Holm's correction over all rows."""
    return compare_several(old, [new], level=level)[0]


def compare_several(first: Report, others: Sequence[Report], *, level: float = LEVEL) -> list[ComparedReports]:
    """Compare each of `others` with the first run; Holm's correction covers the rows of all comparisons."""
    found = [(incomparable(first.model, other.model), circumstances(first, other)) for other in others]
    rows = [() if problem else tuple(_rows(first, other)) for (problem, _), other in zip(found, others, strict=True)]
    judged = iter(with_verdicts([row for part in rows for row in part], level))
    return [
        ComparedReports(problem, differences, tuple(next(judged) for _ in part))
        for (problem, differences), part in zip(found, rows, strict=True)
    ]


def with_verdicts(rows: Sequence[Row], level: float = LEVEL) -> list[Row]:
    """Return rows with p corrected for all of them, and their verdicts at `level`."""
    adjusted = iter(corrected([row.p for row in rows if row.p is not None]))
    return [row if row.p is None else _verdict(replace(row, p_holm=next(adjusted)), level) for row in rows]


def incomparable(old: Model | None, new: Model | None) -> str | None:
    """Return why results of two models cannot be compared, None if they can as far as is known."""
    return None if new is None else unlike(old, new.architecture, new.parameters)


def unlike(model: Model | None, architecture: str | None, parameters: int | None = None) -> str | None:
    """Return why `model` cannot be compared with a model of this architecture and size; None is unknown."""
    if model is None:
        return None
    found = ("architecture", model.architecture, architecture), ("number of parameters", model.parameters, parameters)
    for name, one, other in found:
        if one is not None and other is not None and one != other:
            return f"another model: its {name} was {one} and is now {other}"
    return None


def other_questions(metric: str, before: Mapping[str, str] | None, after: Mapping[str, str] | None) -> str | None:
    """Return why the samples of a metric cannot be paired, from the hashes of both runs' data, None if they can."""
    if before is None or after is None or not find_metric(metric).sampled:
        return None
    part = data_part(metric)
    parts = (part,) if part is not None else tuple(name for name in after if name != METHODS)
    other = [name for name in parts if before.get(name) != after.get(name)]
    return f"different {' and '.join(other)} were used" if other else None


def circumstances(old: Report, new: Report) -> tuple[Difference, ...]:
    """Return all differences between two runs except their measurements."""
    found = []
    if old.model is not None and new.model is not None:
        found += [Difference("model", text) for text in _changed(_named(old.model), _named(new.model), _MODEL)]
    if (one := _seeds(old)) != (other := _seeds(new)):
        found.append(Difference("seed", f"{one} -> {other}"))
    found += [Difference("data", text) for text in _data(old, new)]
    found += [Difference("settings", text) for text in _settings(old, new)]
    was, now = old.environment, new.environment
    versions = [*_changed({"python": was.python}, {"python": now.python}), *_changed(was.packages, now.packages)]
    return tuple(found + [Difference("versions", text) for text in versions])


def _rows(old: Report, new: Report) -> Iterator[Row]:
    before, after = old.by_id, new.by_id
    drawn = _seeds(old) != _seeds(new)
    for name in dict.fromkeys((*after, *before)):
        was, now = (records[name].by_metric if name in records else {} for records in (before, after))
        for metric in dict.fromkeys((*now, *was)):
            one, other = was.get(metric), now.get(metric)
            if one is None or other is None:
                yield _alone(name, one, other)
            else:
                unpaired = other_questions(metric, before[name].data, after[name].data)
                yield compare_metric(name, one, other, unpaired, drawn=drawn)


def _alone(composition: str, old: Measured | None, new: Measured | None) -> Row:
    found = old or new
    assert found is not None
    was, now = (None if measured is None else measured.value for measured in (old, new))
    verdict: Compared = "new" if old is None else "gone"
    return Row(composition, found.metric, found.higher_is_better, was, now, None, None, found.n, None, None, verdict)


def compare_metric(
    composition: str, old: Measured, new: Measured, unpaired: str | None = None, *, drawn: bool = False
) -> Row:
    """Compare a metric, two-sided; `unpaired` is why samples cannot be paired, `drawn` is whether the seeds differ."""
    better = new.higher_is_better
    row = Row(composition, new.metric, better, old.value, new.value, None, None, new.n, None, None, "same")
    if row.old is None or row.new is None:
        return replace(row, verdict="unknown", note="not finite")
    if old.partial or new.partial:
        return replace(row, verdict="unknown", note="measured in part")
    row = replace(row, difference=row.new - row.old)
    if better != old.higher_is_better:
        return replace(row, verdict="unknown", note="the direction of the metric changed")
    before, after = ([measured.measurement(run) for run in measured.runs] for measured in (old, new))
    if is_exact(after, before):
        return replace(row, stderr=0.0, verdict="changed" if row.difference else "equal")
    if unpaired is not None:
        return _unpaired(row, old, new, unpaired) if drawn else replace(row, verdict="unknown", note=unpaired)
    if not row.difference and [m.samples for m in before] == [m.samples for m in after]:
        return replace(row, verdict="equal")
    try:
        found = change(after, before, "the old run", "different")
    except EvaluationError as error:
        return replace(row, verdict="unknown", note=str(error))
    return replace(row, stderr=found.stderr, n=found.n, p=found.p)


def _unpaired(row: Row, old: Measured, new: Measured, why: str) -> Row:
    """Compare a metric by the standard errors of both runs, whose samples are independent."""
    if old.stderr is None or new.stderr is None or row.difference is None:
        return replace(row, verdict="unknown", note=why)
    error = math.hypot(old.stderr, new.stderr)
    p = math.erfc(abs(row.difference) / error / math.sqrt(2)) if error else float(not row.difference)
    return replace(row, stderr=error, p=p, note=f"unpaired: {why}")


def _verdict(row: Row, level: float) -> Row:
    assert row.p_holm is not None and row.difference is not None
    if row.p_holm > level:
        return row
    return replace(row, verdict="better" if (row.difference > 0) == row.higher_is_better else "worse")


def _data(old: Report, new: Report) -> Iterator[str]:
    """Yield the parts of the data that differ."""
    before, after = map(_data_hashes, (old, new))
    for part in after:
        if part in before and before[part] != after[part]:
            yield part if part != METHODS else "texts or edits that methods read"


def _data_hashes(report: Report) -> Mapping[str, str]:
    return next((record.data for record in report.compositions if record.data is not None), {})


def _settings(old: Report, new: Report) -> Iterator[str]:
    for section in ("model", "world", "evaluate"):
        was, now = getattr(old.recipe, section), getattr(new.recipe, section)
        yield from _changed(
            was, now, {key: f"{section}.{key}" for key in now if key not in ("path", "folder", "thresholds")}
        )
    before = {record.id: record.steps for record in old.compositions}
    yield from dict.fromkeys(
        f"{other.id}: {text}"
        for record in new.compositions
        for one, other in zip(before.get(record.id, ()), record.steps, strict=False)
        for text in _changed(given(one), given(other))
    )


def given(step: Step) -> dict[str, Any]:
    """Return the settings of a step, and the hash of the files that they name if there is one."""
    content = step.details.get("content")
    return dict(step.settings) if content is None else {**step.settings, "content": content}


def _named(model: Model) -> dict[str, Any]:
    return {key: getattr(model, key) for key in _MODEL}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[str]:
    """Return `name: old -> new` for each key whose value changed; `names` selects and names the keys."""
    keys = {key: key for key in (*old, *new)} if names is None else names
    return [
        f"{name}: {_short(old.get(key))} -> {_short(new.get(key))}"
        for key, name in keys.items()
        if old.get(key) != new.get(key)
    ]


def _seeds(report: Report) -> str:
    return f"seed {report.seed}" + (f", {report.repeats} repeats" if report.repeats > 1 else "")


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    return text[:_SHOWN] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", text) else text
