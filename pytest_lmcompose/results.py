"""The records of a run, as its report holds them: typed, frozen, and the source of the report's JSON Schema.

A run encodes a record once, where it leaves the process (a worker's message, the report's file), and `decode` checks
it where it comes in. JSON has no NaN: a number that is not finite becomes null, and an outcome says in `nonfinite`
which it was. Fields with a default may be absent; fields that a later minor version added are ignored.

    python -m pytest_lmcompose.results > pytest_lmcompose/report/schema/report-1.schema.json
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace as replace

from pytest_lmcompose.composition import CompositionError, parse
from pytest_lmcompose.distribute.shard import Shard
from pytest_lmcompose.gate.thresholds import LOST, Rule, Unused

if TYPE_CHECKING:
    from evaluators.measurement import Measurement

SCHEMA_VERSION: Literal[1] = 1
SCHEMA_MINOR = 5
"""Counts what version 1 gained: readers of an earlier one find all that they know."""

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Number = float | None
"""None: not finite, or not known."""
Labels = tuple[Whole, ...]
Status = Literal["finished", "interrupted"]
Compared = Literal["equal", "same", "better", "worse", "changed", "new", "gone", "unknown"]
T = TypeVar("T")


def _written(value: T) -> T:
    """Return a default for what earlier versions lack, and that is always written: msgspec calls no factory for it."""
    return msgspec.field(default_factory=lambda: value)


class Base(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all records share."""


class Environment(Base, frozen=True):
    """What the numbers may depend on besides the recipe."""

    python: str
    platform: str
    machine: str
    cores: Positive
    packages: dict[str, str]


class Tokenisation(Base, frozen=True):
    """The special tokens that the tokenizer puts around every text by default."""

    adds_bos: bool
    start: tuple[str, ...]
    end: Annotated[tuple[str, ...], Meta(description="of whole texts; left out where a text goes on")]


class Model(Base, frozen=True):
    """The model that was loaded."""

    id: Annotated[str, Meta(description="as the recipe names it")]
    location: Annotated[str, Meta(description="folder or hub id that was loaded")]
    revision: Annotated[str | None, Meta(description="commit on the hub; null for a folder")]
    weight_hash: Annotated[Hash, Meta(description="SHA-256 of sorted names, dtypes, shapes and bytes")]
    dtype: str
    device: str
    parameters: Whole
    architecture: Annotated[str | None, Meta(description="class, layers, width and vocabulary")] = None
    tokenisation: Tokenisation | None = None


class RecipeSections(Base, frozen=True):
    """The recipe's sections, apart from the methods' own: see the settings of each step."""

    model: dict[str, Any]
    world: dict[str, Any]
    evaluate: dict[str, Any]
    suite: dict[str, Any]


class Step(Base, frozen=True):
    """One application of a method."""

    id: str
    method: str
    category: str
    settings: dict[str, Any]
    seed: Whole
    seconds: Seconds
    peak_memory_bytes: Whole
    changed_parameters: Positive
    changed: tuple[str, ...]
    details: Annotated[dict[str, Any], Meta(description="reported by the method; null: not a finite number")]
    warnings: tuple[str, ...]
    promises: Annotated[
        dict[str, float] | None, Meta(description="values of metrics that its settings promise; absent: not known")
    ] = None


class Outcome(Base, frozen=True, kw_only=True):
    """A value with its noise and the samples behind it."""

    value: Number
    nonfinite: Annotated[
        Literal["nan", "inf", "-inf"] | None, Meta(description="only where value is null: what it was")
    ] = None
    stderr: Number
    n: Positive
    samples: Annotated[tuple[Number, ...], Meta(description="outcomes in the order of the data")]
    weights: Annotated[
        tuple[float, ...], Meta(description="how much each sample counts in value; absent: all alike")
    ] = ()
    clusters: Annotated[
        Labels,
        Meta(
            description="a label per sample: samples of one label, such as the prompts of one edit, are not "
            "independent; absent: every sample is"
        ),
    ] = ()
    answers: Annotated[
        tuple[str, ...], Meta(description="what the model said to each sample, cut to 80 characters")
    ] = ()

    @property
    def number(self) -> float:
        """The value, infinite or NaN where it was."""
        return float(self.nonfinite or "nan") if self.value is None else self.value


class RepeatOutcome(Outcome, frozen=True, kw_only=True):
    """The outcome of one repeat."""

    seed: Whole


class Measured(Outcome, frozen=True, kw_only=True):
    """One metric of one composition, over all repeats."""

    metric: str
    higher_is_better: bool
    note: str
    repeats: Annotated[
        tuple[RepeatOutcome, ...],
        Meta(description="only of several: the runs whose mean is value, and whose samples are samples, in order"),
    ] = ()

    @property
    def runs(self) -> Sequence[Outcome]:
        """The repeats behind the measurement; itself where there is one."""
        return self.repeats or (self,)

    def seed_of(self, run: Outcome, first: int) -> int:
        """Return the seed of one of `runs`; `first` is the seed of a run without repeats."""
        return run.seed if isinstance(run, RepeatOutcome) else first

    @classmethod
    def of(cls, found: Measurement, runs: Sequence[tuple[int, Measurement]] = ()) -> Measured:
        """Make the record of a measurement, with that of each of several repeats and its seed."""
        repeats = tuple(RepeatOutcome(seed=seed, **_outcome(run)) for seed, run in runs)
        return cls(
            metric=found.metric,
            higher_is_better=found.higher_is_better,
            note=found.note,
            repeats=repeats,
            **_outcome(found),
        )

    def measurement(self, run: Outcome | None = None) -> Measurement:
        """Return what was recorded: the measurement itself, or one of its `runs`."""
        from evaluators.measurement import Measurement

        run = self if run is None else run
        return Measurement(
            self.metric,
            run.number,
            run.stderr,
            run.n,
            self.higher_is_better,
            tuple(math.nan if sample is None else sample for sample in run.samples),
            self.note,
            run.weights,
            run.clusters,
            run.answers,
        )


def _outcome(found: Measurement) -> dict[str, Any]:
    finite = math.isfinite(found.value)
    return {
        "value": found.value if finite else None,
        "nonfinite": None if finite else str(found.value),
        "stderr": found.stderr,
        "n": found.n,
        "samples": found.samples,
        "weights": found.weights,
        "clusters": found.clusters,
        "answers": found.answers,
    }


class Paired(Base, frozen=True):
    """A paired comparison with a reference; drops are in the metric's unit, positive where it got worse."""

    test: str
    n: Positive
    drop: Number
    stderr: Annotated[Number, Meta(description="of the drop")]
    p: Probability
    p_holm: Probability
    gates: Annotated[Positive, Meta(description="paired gates that p_holm is corrected for")]
    smallest_drop: Annotated[Number, Meta(description="found with probability power at level; null: no drop is")]
    power: float
    level: Annotated[float, Meta(description="alpha over the number of planned gates: what Holm asks of the least p")]
    clusters: Annotated[
        Whole, Meta(description="independent groups of samples, such as the prompts of one edit; 0: each sample is one")
    ] = 0
    smallest_p: Annotated[Probability, Meta(description="that these samples can reach; 0: any")] = 0.0
    rises: Annotated[bool, Meta(description="whether the metric gets worse by rising")] = False


class Gate(Base, frozen=True):
    """What a gate found; the message of a failed one says what was expected."""

    metric: str
    gate: Annotated[str, Meta(description="the kind of bound, finite or measured")]
    threshold: Number
    passed: bool
    message: str
    value: Number
    base_value: Annotated[Number, Meta(description="of what it is compared with")]
    paired: Annotated[Paired | None, Meta(description="of no_drop_p: the comparison with the reference")] = None
    reference: Annotated[
        str | None, Meta(description="a composition or a stored run; null: nothing, or the base model")
    ] = None

    @property
    def state(self) -> Literal["passed", "failed", "lost"]:
        """How it came out; lost: a promise that is broken, as the thresholds say and accept."""
        return "failed" if not self.passed else "lost" if self.gate == LOST else "passed"


class RepeatInfo(Base, frozen=True):
    """One repeat of a composition."""

    seed: Whole
    state_hash: Hash
    evaluate_seconds: Seconds


class CompositionResult(Base, frozen=True):
    """Everything a run found about one composition."""

    id: str
    requested: tuple[str, ...]
    executed: Annotated[tuple[str, ...], Meta(description="ids of the steps that ran, in order")]
    status: Literal["begun", "built", "measured", "failed", "interrupted"]
    error: Annotated[str | None, Meta(description="what ended a failed or interrupted one")]
    state_hash: Hash | None
    steps: tuple[Step, ...]
    evaluate_seconds: Number
    measurements: tuple[Measured, ...]
    gates: tuple[Gate, ...]
    data: Annotated[
        dict[str, str] | None,
        Meta(description="a hash of each part of what was asked: samples belong together where it is the same"),
    ] = None
    repeats: Annotated[tuple[RepeatInfo, ...], Meta(description="only of several")] = ()

    @property
    def by_metric(self) -> dict[str, Measured]:
        """The measurements by their metric."""
        return {measured.metric: measured for measured in self.measurements}

    @property
    def runs(self) -> tuple[tuple[Measurement, ...], ...]:
        """The measurements of each repeat."""
        count = max((len(measured.runs) for measured in self.measurements), default=0)
        return tuple(
            tuple(m.measurement(m.runs[i]) for m in self.measurements if i < len(m.runs)) for i in range(count)
        )

    @property
    def failed_metrics(self) -> frozenset[str]:
        """The metrics of the gates that failed."""
        return frozenset(gate.metric for gate in self.gates if not gate.passed)

    @property
    def lost_metrics(self) -> frozenset[str]:
        """The metrics with a known loss."""
        return frozenset(gate.metric for gate in self.gates if gate.state == "lost") - self.failed_metrics


class Interval(Base, frozen=True):
    """A value with its confidence interval, where it has one."""

    value: float
    low: Number
    high: Number


class OrderValue(Base, frozen=True):
    """One order of a set of steps."""

    id: str
    value: Number


class OrderedSet(Base, frozen=True):
    """One metric of a set of steps that was measured in several orders."""

    steps: Annotated[tuple[str, ...], Meta(description="sorted")]
    metric: str
    higher_is_better: bool
    orders: Annotated[tuple[OrderValue, ...], Meta(min_length=2)]
    best: str | None
    order_free_error: Interval | None
    order_sensitivity: Interval | None
    n: Positive
    repeats: Positive
    note: Annotated[str, Meta(description="why something is null")]


class StepInterference(Base, frozen=True):
    """What later steps changed since one step; null where the prefix was not measured."""

    step: str
    prefix: str
    change: Annotated[tuple[Number, ...] | None, Meta(description="of each metric: value at the end minus after it")]
    stderr: Annotated[tuple[Number, ...] | None, Meta(description="paired on the samples")]


class Interference(Base, frozen=True):
    """What later steps changed, of a composition with a prefix that was measured itself."""

    composition: str
    metrics: tuple[str, ...]
    steps: tuple[StepInterference, ...]


class Share(Base, frozen=True):
    """A share of what a step achieved."""

    composition: str
    step: str
    prefix: Annotated[str, Meta(description="id of the state right after the step")]
    metric: str
    value: Annotated[Number, Meta(description="null where there was nothing to keep or to bring back")]
    stderr: Annotated[Number, Meta(description="of a ratio of paired samples")]
    n: Positive
    note: str


class Composability(Base, frozen=True, omit_defaults=False):
    """What the sequences of steps cost, and what survived them."""

    confidence: float
    resamples: int
    orders: tuple[OrderedSet, ...]
    interference: tuple[Interference, ...]
    survival: Annotated[
        tuple[Share, ...], Meta(description="of what an edit step achieved: value at the end over value after the step")
    ] = ()
    returned: Annotated[
        tuple[Share, ...], Meta(description="of the knowledge that an unlearning step removed: the share that is back")
    ] = ()


class BaselineFile(Base, frozen=True):
    """A stored run that gates compare with."""

    file: str
    started: Time


class Plan(Base, frozen=True):
    """What the whole run sets out to test, before it is divided into shards, and by which rules."""

    compositions: Annotated[tuple[str, ...], Meta(description="of the tests that -k and -m left, sorted")]
    judged: Annotated[tuple[str, ...], Meta(description="those whose tests ask for gates")]
    rules: Annotated[tuple[Rule, ...], Meta(description="the thresholds, then the expressions of the command line")]
    steps: Annotated[dict[str, dict[str, Any]], Meta(description="settings by step")]
    baseline: BaselineFile | None


class Part(Base, frozen=True):
    """One of the reports that a report was merged from."""

    status: Status
    started: Time
    finished: Time
    environment: Environment
    shard: Shard | None = None


class Prompts(Base, frozen=True):
    """What the samples asked, once for all metrics that ask the same."""

    seed: Whole
    metrics: tuple[str, ...]
    texts: Annotated[tuple[str, ...], Meta(description="in the order of the samples, with the expected answer")]


class Stored(Base, frozen=True):
    """How a run was stored."""

    name: str
    how: Literal["save", "autosave", "update"]
    passed: Annotated[bool, Meta(description="whether all tests of the run passed")]
    commit: str | None
    dirty: Annotated[bool, Meta(description="whether files were not committed")]


class Difference(Base, frozen=True):
    """One circumstance in which two runs differ."""

    what: Literal["model", "data", "seed", "settings", "versions"]
    message: str


class Row(Base, frozen=True, omit_defaults=False):
    """One metric of one composition in two runs."""

    composition: str
    metric: str
    higher_is_better: bool
    old: Number
    new: Number
    difference: Annotated[Number, Meta(description="new minus old")]
    stderr: Annotated[Number, Meta(description="of the difference, paired on the samples; 0: read, not sampled")]
    n: Positive
    p: Annotated[Number, Meta(description="two-sided")]
    p_holm: Annotated[Number, Meta(description="corrected for all rows")]
    verdict: Annotated[
        Compared,
        Meta(
            description="equal: no sample changed; same: no more than noise; changed: another value of what is read "
            "off the weights; new, gone: in one run only; unknown: see the note"
        ),
    ]
    note: str = ""


class Comparison(Base, frozen=True):
    """The comparison with a stored run."""

    baseline: Annotated[str, Meta(description="name of its file")]
    started: Time
    seed: Whole
    commit: str | None
    problem: Annotated[str | None, Meta(description="why nothing can be compared")]
    differences: tuple[Difference, ...]
    rows: Annotated[tuple[Row, ...], Meta(description="of every metric of every composition in either run")]


class DriftRow(Base, frozen=True):
    """The course of one metric over stored runs."""

    composition: str
    metric: str
    values: Annotated[tuple[float, ...], Meta(description="the oldest run's first")]
    loss: Annotated[float, Meta(description="from the oldest to the present one; positive: worse")]
    p: Annotated[float, Meta(description="one-sided Mann-Kendall, exact")]
    p_holm: float
    drifts: bool


class Drift(Base, frozen=True):
    """Metrics that got worse and worse over the stored runs."""

    runs: Annotated[Positive, Meta(description="the present one too")]
    level: Annotated[float, Meta(description="chance of any false alarm")]
    judged: Annotated[Whole, Meta(description="courses that p_holm is corrected for")]
    rows: tuple[DriftRow, ...]


class Report(Base, frozen=True, kw_only=True):
    """What one run measured."""

    schema_version: Literal[1]
    schema_minor: Whole = _written(0)
    status: Annotated[Status, Meta(description="interrupted: by Ctrl-C, -x, --maxfail or an internal error")]
    started: Time
    finished: Time
    seed: Whole
    repeats: Annotated[Positive, Meta(description="runs of each composition, with seeds from `seed` up")] = _written(1)
    environment: Environment
    shard: Annotated[Shard | None, Meta(description="which part of the compositions this run tested")] = None
    plan: Plan | None = None
    model: Annotated[Model | None, Meta(description="null if it was never loaded")]
    recipe: RecipeSections
    compositions: tuple[CompositionResult, ...]
    composability: Annotated[Composability | None, Meta(description="null if nothing was measured")] = _written(None)
    prompts: tuple[Prompts, ...] = _written(())
    merged: Annotated[tuple[Part, ...], Meta(description="what was joined, in order")] = ()
    stored: Annotated[Stored | None, Meta(description="only of a run in a storage folder")] = None
    comparison: Annotated[Comparison | None, Meta(description="with a stored run")] = None
    drift: Drift | None = None
    unused_rules: Annotated[tuple[Unused, ...] | None, Meta(description="rules that judged nothing")] = None

    @property
    def by_id(self) -> dict[str, CompositionResult]:
        """The results by composition."""
        return {record.id: record for record in self.compositions}

    @property
    def seeds(self) -> range:
        """The seed of each repeat."""
        return range(self.seed, self.seed + self.repeats)


class Message(Base, frozen=True):
    """What a worker sends of one composition."""

    model: Model | None
    composition: CompositionResult


class ReportError(ValueError):
    """A document that is no report of a known version, or contradicts itself; the message names the place."""


class LaterReportError(ReportError):
    """A report of a later version than this one reads."""


def encode(record: Base, *, indent: int | None = None) -> str:
    """Return a record as JSON, null for every number that is not finite."""
    text = msgspec.json.encode(record)
    return (text if indent is None else msgspec.json.format(text, indent=indent)).decode()


def decode_message(text: str) -> Message:
    """Read what a worker sent."""
    return _MESSAGE.decode(text)


def decode(text: str | bytes) -> Report:
    """Read a report; raises ReportError for another document, a later version, or one that contradicts itself."""
    try:
        found = _VERSION.decode(text)
    except msgspec.ValidationError as error:
        if "schema_version" in str(error) or "Expected `object`" in str(error):
            raise ReportError("is no report of pytest-lmcompose: it has no schema_version") from None
        raise ReportError(f"is damaged: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(f"is broken or cut off: {error or 'lists in lists without end'}") from None
    if found.schema_version != SCHEMA_VERSION or isinstance(found.schema_version, bool):
        later = isinstance(found.schema_version, int) and found.schema_version > SCHEMA_VERSION
        raise (LaterReportError if later else ReportError)(
            f"has the report schema {found.schema_version!a:.40}, and this version reads {SCHEMA_VERSION}"
        )
    try:
        report = _REPORT.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ReportError(f"is damaged: {error}") from None
    for problem in contradictions(report):
        raise ReportError(f"is damaged: {problem}")
    return report


def schema() -> dict[str, Any]:
    """Return the JSON Schema of reports, made from these types."""
    _, parts = msgspec.json.schema_components([Report], ref_template="#/$defs/{name}")
    report = parts.pop("Report")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:pytest-lmcompose:report-{SCHEMA_VERSION}",
        "title": f"pytest-lmcompose report, version {SCHEMA_VERSION}",
        "description": "What one run measured. Version 1 may gain optional properties, each counted by schema_minor; "
        "anything else is a new version.",
        **{key: value for key, value in report.items() if key not in ("title", "description")},
        "$defs": parts,
    }


def contradictions(report: Report) -> Iterator[str]:
    """Yield what readers take for granted and no type can say."""
    times = [report.started, report.finished, *(t for part in report.merged for t in (part.started, part.finished))]
    for text in times:
        if not _is_time(text):
            yield f"{text!a} is no time such as 2026-01-01T12:00:00+00:00"
    yield from _twice((record.id for record in report.compositions), "two records of the composition {}")
    interference = () if report.composability is None else report.composability.interference
    names = [step.step for entry in interference for step in entry.steps]
    names += [step for record in report.compositions for step in record.requested]
    for text in (*(() if report.plan is None else report.plan.compositions), *names):
        try:
            parse(text)
        except CompositionError:
            yield f"{text!a} is no composition"
    for record in report.compositions:
        name = f"the composition {record.id!a}"
        yield from _twice((m.metric for m in record.measurements), f"two measurements of {{}} in {name}")
        for measured in record.measurements:
            for run in (measured, *measured.repeats):
                for key in ("weights", "clusters"):
                    if (found := getattr(run, key)) and len(found) != len(run.samples):
                        yield f"{len(found)} {key} for {len(run.samples)} samples of {measured.metric!a} in {name}"
                if (run.value is None) != (run.nonfinite is not None):
                    yield f"{measured.metric!a} in {name} without a value, or with two"
        for gate in record.gates:
            if gate.paired is not None and None in (gate.threshold, gate.value, gate.base_value):
                yield f"a paired gate of {gate.metric!a} in {name} without its numbers"
    for entry in interference:
        for step in entry.steps:
            for numbers in (step.change, step.stderr):
                if numbers is not None and len(numbers) != len(entry.metrics):
                    yield f"{len(numbers)} numbers for {len(entry.metrics)} metrics of interference"
            if (step.change is None) != (step.stderr is None):
                yield "interference with a change or an error alone"
    if report.shard is not None and not 1 <= report.shard.index <= report.shard.count:
        yield f"shard {report.shard.index} of {report.shard.count}"


def _twice(names: Iterator[str], said: str) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield said.format(ascii(name))
        seen.add(name)


def _is_time(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


class _Version(msgspec.Struct):
    schema_version: Any


_VERSION = msgspec.json.Decoder(_Version)
_REPORT = msgspec.json.Decoder(Report)
_MESSAGE = msgspec.json.Decoder(Message)

if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
