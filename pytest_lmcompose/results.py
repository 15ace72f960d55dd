"""Results of a run as frozen, typed records, which also define the JSON Schema of reports.

Records are encoded when they leave the process (worker messages, report files) and validated by `decode`. JSON has no
NaN: numbers that are not finite become null, and `nonfinite` of an outcome says which. Fields with a default may be
absent; unknown fields of later minor versions are ignored.

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
from pytest_lmcompose.gate.thresholds import LEVEL, LOST, Rule, Unused

if TYPE_CHECKING:
    from evaluators.measurement import Measurement

SCHEMA_VERSION: Literal[1] = 1
SCHEMA_MINOR = 10
"""Number of compatible additions to version 1."""

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Number = float | None
"""None: not finite or unknown."""
Labels = tuple[Whole, ...]
Status = Literal["finished", "interrupted"]
Compared = Literal["equal", "same", "better", "worse", "changed", "new", "gone", "unknown"]
T = TypeVar("T")


def _always(value: T) -> T:
    """Return a default for a field that is always written: msgspec omits plain defaults."""
    return msgspec.field(default_factory=lambda: value)


class Base(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base class of all records."""


class Environment(Base, frozen=True):
    """Machine and package versions."""

    python: str
    platform: str
    machine: str
    cores: Positive
    packages: dict[str, str]


class Tokenisation(Base, frozen=True):
    """Special tokens that the tokenizer adds to every text by default."""

    adds_bos: bool
    start: tuple[str, ...]
    end: Annotated[tuple[str, ...], Meta(description="for complete texts; not added to a text that is continued")]
    chat: Annotated[str | None, Meta(description="a prompt in the chat template; null: prompts are plain")] = None


class Model(Base, frozen=True):
    """The model that was loaded."""

    id: Annotated[str, Meta(description="as in the recipe")]
    location: Annotated[str, Meta(description="loaded folder or hub id")]
    revision: Annotated[str | None, Meta(description="hub commit; null for a folder")]
    weight_hash: Annotated[Hash, Meta(description="SHA-256 of sorted names, dtypes, shapes and bytes")]
    dtype: str
    device: str
    parameters: Whole
    architecture: Annotated[str | None, Meta(description="class, layers, width and vocabulary")] = None
    tokenisation: Tokenisation | None = None


class RecipeSections(Base, frozen=True):
    """The recipe's sections, except methods; steps have their own settings."""

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
    details: Annotated[dict[str, Any], Meta(description="reported by the method; null: not finite")]
    warnings: tuple[str, ...]
    promises: Annotated[
        dict[str, float] | None, Meta(description="values of metrics that the settings promise; absent: unknown")
    ] = None


class Outcome(Base, frozen=True, kw_only=True):
    """A value with its samples and standard error."""

    value: Number
    nonfinite: Annotated[Literal["nan", "inf", "-inf"] | None, Meta(description="only if value is null: the value")] = (
        None
    )
    stderr: Number
    n: Positive
    samples: Annotated[tuple[Number, ...], Meta(description="outcomes, in the order of the data")]
    weights: Annotated[
        tuple[float, ...], Meta(description="weight of each sample in value; absent: equal weights")
    ] = ()
    clusters: Annotated[
        Labels,
        Meta(
            description="one label per sample: samples with the same label, such as the prompts of one edit, are "
            "not independent; absent: all are"
        ),
    ] = ()
    answers: Annotated[
        tuple[str, ...], Meta(description="the model's answer to each sample, cut to 80 characters")
    ] = ()

    @property
    def number(self) -> float:
        """The value, which may be infinite or NaN."""
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
        Meta(description="only with several repeats: value is their mean, samples are all their samples in order"),
    ] = ()
    total: Annotated[
        Whole, Meta(description="samples of the whole data, which n is a part of; absent: it was measured at once")
    ] = 0

    @property
    def partial(self) -> bool:
        """Whether not all of the data was used, so that the value says little beyond its gates."""
        return self.n < self.total

    @property
    def runs(self) -> Sequence[Outcome]:
        """The outcome of each repeat; the measurement itself if there is only one."""
        return self.repeats or (self,)

    def seed_of(self, run: Outcome, first: int) -> int:
        """Return the seed of one of `runs`; `first` is the seed of a run without repeats."""
        return run.seed if isinstance(run, RepeatOutcome) else first

    @classmethod
    def of(cls, found: Measurement, runs: Sequence[tuple[int, Measurement]] = ()) -> Measured:
        """Return the record of a measurement, with pairs of seed and measurement of several repeats."""
        repeats = tuple(RepeatOutcome(seed=seed, **_outcome(run)) for seed, run in runs)
        return cls(
            metric=found.metric,
            higher_is_better=found.higher_is_better,
            note=found.note,
            repeats=repeats,
            total=found.total,
            **_outcome(found),
        )

    def measurement(self, run: Outcome | None = None) -> Measurement:
        """Convert back to a measurement: the whole, or one of its `runs`."""
        from evaluators.measurement import Measurement

        run = self if run is None else run
        return Measurement(
            self.metric,
            run.number,
            run.stderr,
            run.n,
            self.higher_is_better,
            tuple(math.nan if x is None else x for x in run.samples) if None in run.samples else run.samples,  # type: ignore[arg-type]
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
    """A paired comparison with a reference; drops are in the metric's unit, positive if it got worse."""

    test: str
    n: Positive
    drop: Number
    stderr: Annotated[Number, Meta(description="of the drop")]
    p: Probability
    p_holm: Probability
    gates: Annotated[Positive, Meta(description="paired gates that p_holm is corrected for")]
    smallest_drop: Annotated[Number, Meta(description="minimum detectable effect with this power at level; null: none")]
    power: float
    level: Annotated[
        float, Meta(description="alpha over the number of planned gates: Holm's threshold for the smallest p")
    ]
    clusters: Annotated[
        Whole, Meta(description="number of independent clusters of samples; 0: all samples are independent")
    ] = 0
    smallest_p: Annotated[Probability, Meta(description="smallest p that these samples can give; 0: any")] = 0.0
    rises: Annotated[bool, Meta(description="whether the metric gets worse by rising")] = False
    effect: Annotated[Number, Meta(description="the drop that needed is for; null: unknown")] = None
    needed: Annotated[
        Whole | None, Meta(description="units with which a drop of effect is detected with this power; null: unknown")
    ] = None


class Evidence(Base, frozen=True):
    """Evidence that a metric lost less than a margin; losses are in the metric's unit, positive if it got worse."""

    test: str
    n: Positive
    units: Annotated[Positive, Meta(description="independent samples, or clusters of them")]
    loss: Number
    upper: Annotated[Number, Meta(description="one-sided upper confidence bound of the loss; null: none")]
    margin: float
    level: float
    needed: Annotated[
        Whole | None, Meta(description="units with which an unchanged model passes with 80 % power; null: unknown")
    ]


class Member(Base, frozen=True):
    """A metric of a pool, tested by itself; its drop is positive if it got worse."""

    metric: str
    n: Positive
    drop: Number
    p: Annotated[Probability, Meta(description="Holm-corrected over the metrics of the pool")]


class Gate(Base, frozen=True):
    """The outcome of a gate."""

    metric: Annotated[str, Meta(description="or the glob of a pool")]
    gate: Annotated[str, Meta(description="kind of bound, or finite or measured")]
    threshold: Number
    passed: bool
    message: str
    value: Number
    base_value: Annotated[Number, Meta(description="value of the reference")]
    paired: Annotated[Paired | None, Meta(description="only for no_drop_p: the comparison with the reference")] = None
    reference: Annotated[
        str | None, Meta(description="a composition or a stored run; null: none, or the base model")
    ] = _always(None)
    evidence: Annotated[Evidence | None, Meta(description="only for not_worse_than")] = None
    pool: Annotated[tuple[Member, ...], Meta(description="the metrics of a pool")] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it judges: of a pool that failed, those that are worse by themselves if there are any."""
        if not self.pool:
            return (self.metric,)
        worse = () if self.passed else self.worse
        return tuple(member.metric for member in worse or self.pool)

    @property
    def worse(self) -> tuple[Member, ...]:
        """The metrics of a pool that are worse by themselves, the worst first."""
        level = LEVEL if self.evidence is None else self.evidence.level
        level = level if self.paired is None or self.threshold is None else self.threshold
        return tuple(sorted((member for member in self.pool if member.p <= level), key=lambda member: member.p))

    @property
    def state(self) -> Literal["passed", "failed", "lost"]:
        """passed, failed, or lost: a broken promise that the thresholds accept (`lost: REASON`)."""
        return "failed" if not self.passed else "lost" if self.gate == LOST else "passed"


class RepeatInfo(Base, frozen=True):
    """One repeat of a composition."""

    seed: Whole
    state_hash: Hash
    evaluate_seconds: Seconds


class Export(Base, frozen=True):
    """The folder that a composition was written to."""

    folder: str
    format: Annotated[str, Meta(description="plain, or a packed format")]
    weights_hash: Annotated[
        Hash, Meta(description="of the weights that a loader gets, as state_hash; of a packed format: de-quantised")
    ]
    files: Annotated[dict[str, Hash], Meta(description="SHA-256 of each file, except lmcompose.json and README.md")]


class CompositionResult(Base, frozen=True):
    """All results of one composition."""

    id: str
    requested: tuple[str, ...]
    executed: Annotated[tuple[str, ...], Meta(description="ids of the steps that ran, in order")]
    status: Literal["begun", "built", "measured", "failed", "interrupted"]
    error: Annotated[str | None, Meta(description="error of a failed or interrupted composition")]
    state_hash: Hash | None
    steps: tuple[Step, ...]
    evaluate_seconds: Number
    measurements: tuple[Measured, ...]
    gates: tuple[Gate, ...]
    data: Annotated[
        dict[str, str] | None,
        Meta(description="hash of each part of the data; samples with equal hashes can be paired"),
    ] = None
    repeats: Annotated[tuple[RepeatInfo, ...], Meta(description="only with several repeats")] = ()
    export: Annotated[Export | None, Meta(description="only with --lmcompose-export")] = None

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
        return frozenset(metric for gate in self.gates if not gate.passed for metric in gate.metrics)

    @property
    def lost_metrics(self) -> frozenset[str]:
        """The metrics with a known loss."""
        return frozenset(gate.metric for gate in self.gates if gate.state == "lost") - self.failed_metrics


class Interval(Base, frozen=True):
    """A value with its confidence interval, if it has one."""

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
    note: Annotated[str, Meta(description="reason for null values")]


class StepInterference(Base, frozen=True):
    """Change by the steps after one step; null if the prefix was not measured."""

    step: str
    prefix: str
    change: Annotated[tuple[Number, ...] | None, Meta(description="value at the end minus value after the step")]
    stderr: Annotated[tuple[Number, ...] | None, Meta(description="over paired samples")]


class Interference(Base, frozen=True):
    """Changes by later steps in a composition with measured prefixes."""

    composition: str
    metrics: tuple[str, ...]
    steps: tuple[StepInterference, ...]


class Share(Base, frozen=True):
    """Survival or return of the effect of a step."""

    composition: str
    step: str
    prefix: Annotated[str, Meta(description="id of the state right after the step")]
    metric: str
    value: Annotated[Number, Meta(description="null if the step had no effect")]
    stderr: Annotated[Number, Meta(description="ratio of paired samples")]
    n: Positive
    note: str


class Composability(Base, frozen=True, omit_defaults=False):
    """Composability metrics of a run."""

    confidence: float
    resamples: int
    orders: tuple[OrderedSet, ...]
    interference: tuple[Interference, ...]
    survival: Annotated[
        tuple[Share, ...], Meta(description="of edits: value at the end divided by value after the step")
    ] = ()
    returned: Annotated[
        tuple[Share, ...], Meta(description="share of the unlearned knowledge that is back at the end")
    ] = ()


class BaselineFile(Base, frozen=True):
    """A stored run that gates compare with."""

    file: str
    started: Time


class Plan(Base, frozen=True):
    """Compositions and rules of the whole run, before sharding."""

    compositions: Annotated[tuple[str, ...], Meta(description="of the tests selected by -k and -m, sorted")]
    judged: Annotated[tuple[str, ...], Meta(description="compositions with gates")]
    rules: Annotated[tuple[Rule, ...], Meta(description="thresholds, then --lmcompose-compare-fail expressions")]
    steps: Annotated[dict[str, dict[str, Any]], Meta(description="settings by step")]
    baseline: BaselineFile | None


class Part(Base, frozen=True):
    """One of the reports in a merged report."""

    status: Status
    started: Time
    finished: Time
    environment: Environment
    shard: Shard | None = None


class Prompts(Base, frozen=True):
    """Prompts of samples, shared by several metrics."""

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
    """A difference in the conditions of two runs."""

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
    stderr: Annotated[Number, Meta(description="of the difference, over paired samples; 0: deterministic")]
    n: Positive
    p: Annotated[Number, Meta(description="two-sided")]
    p_holm: Annotated[Number, Meta(description="Holm-corrected over all rows")]
    verdict: Annotated[
        Compared,
        Meta(
            description="equal: identical samples; same: within noise; changed: different value of a deterministic "
            "metric; new, gone: in one run only; unknown: see the note"
        ),
    ]
    note: str = ""


class Comparison(Base, frozen=True):
    """The comparison with a stored run."""

    baseline: Annotated[str, Meta(description="name of its file")]
    started: Time
    seed: Whole
    commit: str | None
    problem: Annotated[str | None, Meta(description="why the runs cannot be compared")]
    differences: tuple[Difference, ...]
    rows: Annotated[tuple[Row, ...], Meta(description="every metric of every composition in either run")]


class DriftRow(Base, frozen=True):
    """Values of a metric over stored runs."""

    composition: str
    metric: str
    values: Annotated[tuple[float, ...], Meta(description="from the oldest run")]
    loss: Annotated[float, Meta(description="from the oldest run to this one; positive: worse")]
    p: Annotated[float, Meta(description="one-sided Mann-Kendall, exact")]
    p_holm: float
    drifts: bool


class Drift(Base, frozen=True):
    """Drift of metrics over stored runs."""

    runs: Annotated[Positive, Meta(description="including this one")]
    level: Annotated[float, Meta(description="probability of any false alarm")]
    judged: Annotated[Whole, Meta(description="number of tests that p_holm is corrected for")]
    rows: tuple[DriftRow, ...]


class Fix(Base, frozen=True):
    """What to do about a composition that failed."""

    composition: str
    use: Annotated[str | None, Meta(description="the composition to use instead; null: none is known")]
    note: Annotated[str, Meta(description="what changes, what it costs, and whether it was tested")]


class Report(Base, frozen=True, kw_only=True):
    """The report of a run."""

    schema_version: Literal[1]
    schema_minor: Whole = _always(0)
    status: Annotated[Status, Meta(description="interrupted: by Ctrl-C, -x, --maxfail or an internal error")]
    started: Time
    finished: Time
    seed: Whole
    repeats: Annotated[Positive, Meta(description="runs of each composition, with seeds from `seed` up")] = _always(1)
    environment: Environment
    shard: Annotated[Shard | None, Meta(description="shard of the compositions that this run tested")] = None
    plan: Plan | None = None
    model: Annotated[Model | None, Meta(description="null if not loaded")]
    recipe: RecipeSections
    compositions: tuple[CompositionResult, ...]
    composability: Annotated[Composability | None, Meta(description="null if nothing was measured")] = _always(None)
    prompts: tuple[Prompts, ...] = ()
    merged: Annotated[tuple[Part, ...], Meta(description="the merged reports, in order")] = ()
    stored: Annotated[Stored | None, Meta(description="only for a stored run")] = None
    comparison: Annotated[Comparison | None, Meta(description="with a stored run")] = None
    drift: Drift | None = None
    unused_rules: Annotated[tuple[Unused, ...] | None, Meta(description="rules that matched nothing")] = None
    repairs: Annotated[tuple[Fix, ...], Meta(description="found by lmcompose repair")] = ()

    @property
    def by_id(self) -> dict[str, CompositionResult]:
        """The results by composition."""
        return {record.id: record for record in self.compositions}

    @property
    def seeds(self) -> range:
        """The seed of each repeat."""
        return range(self.seed, self.seed + self.repeats)


class Message(Base, frozen=True):
    """A worker's message about one composition."""

    model: Model | None
    composition: CompositionResult


class ReportError(ValueError):
    """Not a report, an unknown version, or an inconsistent report; the message says where."""


class LaterReportError(ReportError):
    """A report of a later version."""


def encode(record: Base, *, indent: int | None = None) -> str:
    """Encode a record as JSON; numbers that are not finite become null."""
    text = msgspec.json.encode(record)
    return (text if indent is None else msgspec.json.format(text, indent=indent)).decode()


def decode_message(text: str) -> Message:
    """Decode the message of a worker."""
    return _MESSAGE.decode(text)


def decode(text: str | bytes) -> Report:
    """Decode and validate a report; raises ReportError if it is invalid or of a later version."""
    try:
        found = _VERSION.decode(text)
    except msgspec.ValidationError as error:
        if "schema_version" in str(error) or "Expected `object`" in str(error):
            raise ReportError("is not a pytest-lmcompose report: it has no schema_version") from None
        raise ReportError(f"is damaged: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(f"is broken or truncated: {error or 'too deeply nested'}") from None
    if found.schema_version != SCHEMA_VERSION or isinstance(found.schema_version, bool):
        later = isinstance(found.schema_version, int) and found.schema_version > SCHEMA_VERSION
        raise (LaterReportError if later else ReportError)(
            f"has report schema {found.schema_version!a:.40}, but this version reads schema {SCHEMA_VERSION}"
        )
    try:
        report = _REPORT.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ReportError(f"is damaged: {error}") from None
    for problem in contradictions(report):
        raise ReportError(f"is damaged: {problem}")
    return report


def schema() -> dict[str, Any]:
    """Return the JSON Schema of reports, generated from these types."""
    _, parts = msgspec.json.schema_components([Report], ref_template="#/$defs/{name}")
    report = parts.pop("Report")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:pytest-lmcompose:report-{SCHEMA_VERSION}",
        "title": f"pytest-lmcompose report, version {SCHEMA_VERSION}",
        "description": "The report of a run. Version 1 may gain optional properties, each counted by schema_minor; "
        "anything else is a new version.",
        **{key: value for key, value in report.items() if key not in ("title", "description")},
        "$defs": parts,
    }


def contradictions(report: Report) -> Iterator[str]:
    """Yield inconsistencies that the types cannot exclude."""
    times = [report.started, report.finished, *(t for part in report.merged for t in (part.started, part.finished))]
    for text in times:
        if not _is_time(text):
            yield f"{text!a} is not a time such as 2026-01-01T12:00:00+00:00"
    yield from _twice((record.id for record in report.compositions), "two results of the composition {}")
    interference = () if report.composability is None else report.composability.interference
    names = [step.step for entry in interference for step in entry.steps]
    names += [step for record in report.compositions for step in record.requested]
    for text in (*(() if report.plan is None else report.plan.compositions), *names):
        try:
            parse(text)
        except CompositionError:
            yield f"{text!a} is not a composition"
    for record in report.compositions:
        name = f"the composition {record.id!a}"
        yield from _twice((m.metric for m in record.measurements), f"two measurements of {{}} in {name}")
        for measured in record.measurements:
            for run in (measured, *measured.repeats):
                for key in ("weights", "clusters"):
                    if (found := getattr(run, key)) and len(found) != len(run.samples):
                        yield f"{len(found)} {key} for {len(run.samples)} samples of {measured.metric!a} in {name}"
                if (run.value is None) != (run.nonfinite is not None):
                    yield f"{measured.metric!a} in {name} needs exactly one of value and nonfinite"
        for gate in record.gates:
            if gate.paired is not None and None in (gate.threshold, gate.value, gate.base_value):
                yield f"a paired gate of {gate.metric!a} in {name} without threshold, value or base_value"
    for entry in interference:
        for step in entry.steps:
            for numbers in (step.change, step.stderr):
                if numbers is not None and len(numbers) != len(entry.metrics):
                    yield f"{len(numbers)} numbers for {len(entry.metrics)} metrics of interference"
            if (step.change is None) != (step.stderr is None):
                yield "interference with only one of change and stderr"
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
