"""The report of a run: what was collected from all processes, made one record and written as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lmcompose.distribute.threads import available_cores
from pytest_lmcompose.report.composability import composability
from pytest_lmcompose.report.files import write_text
from pytest_lmcompose.results import (
    SCHEMA_MINOR,
    SCHEMA_VERSION,
    Composability,
    CompositionResult,
    Environment,
    Message,
    Model,
    Plan,
    Prompts,
    RecipeSections,
    Report,
    encode,
    replace,
)

if TYPE_CHECKING:
    from pytest_lmcompose.distribute.shard import Shard
    from pytest_lmcompose.recipe import Recipe

SCHEMA_PATH = Path(__file__).parent / "schema" / f"report-{SCHEMA_VERSION}.schema.json"
PACKAGES = (
    "pytest-lmcompose",
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "lm_eval",
    "peft",
    "hydra-core",
    "pytest",
    "pytest-xdist",
)


@dataclasses.dataclass
class Collected:
    """What the process that writes the report knows: from its own tests or from its workers'."""

    model: Model | None = None
    records: dict[str, CompositionResult] = dataclasses.field(default_factory=dict)
    """By composition id."""
    composability: Composability | None = None
    prompts: tuple[Prompts, ...] = ()
    """What the samples asked; see `report.prompts`."""
    late: tuple[str, ...] = ()
    """Messages of paired gates that failed when all were judged together."""
    shard: Shard | None = None
    """The part of a run that this is."""
    plan: Plan | None = None
    """What the whole run sets out to test; see `report.planned`."""

    @property
    def results(self) -> tuple[CompositionResult, ...]:
        """The records, in the order in which they came."""
        return tuple(self.records.values())

    def complete(self, seed: int, *, part: bool = False, metrics: Collection[str] | None = None) -> None:
        """Judge and compute what takes all records, once they are here; those of a part of a run as such.

        Composability is computed of `metrics`, where these are all that will be shown of it.
        """
        if self.records:
            self._settle(part=part)
            self.composability = composability(self.results, seed, metrics)

    def add(self, message: Message) -> None:
        """Keep a record, unless a fuller one of the same composition is here already.

        Two workers may both have measured the base model; gates come only from its own test.
        """
        record = message.composition
        self.model = self.model or message.model
        before = self.records.get(record.id)
        if before is None or _fullness(record) >= _fullness(before):
            self.records[record.id] = record

    def _settle(self, *, part: bool) -> None:
        """Judge the paired gates of all records together; keep in `late` what fails only now.

        Some of them were judged before all were known; see `gate.settle`. In a part of a run, those of the other
        parts stay counted.
        """
        paired = [gate.paired for record in self.results for gate in record.gates if gate.paired is not None]
        if not paired:
            return
        from pytest_lmcompose.gate.judge import settle

        planned = max(pair.gates for pair in paired) if part else 0
        for name, gates in settle({r.id: r.gates for r in self.results}, planned).items():
            before = self.records[name].gates
            self.late += tuple(v.message for v, b in zip(gates, before, strict=True) if b.passed and not v.passed)
            self.records[name] = replace(self.records[name], gates=gates)


def document(
    collected: Collected, recipe: Recipe, *, seed: int, repeats: int, started: str, finished: str, status: str
) -> Report:
    """Return the report; `status` is finished or interrupted."""
    return Report(
        schema_version=SCHEMA_VERSION,
        schema_minor=SCHEMA_MINOR,
        status=status,  # type: ignore[arg-type]
        started=started,
        finished=finished,
        seed=seed,
        repeats=repeats,
        environment=environment(),
        shard=collected.shard,
        plan=collected.plan,
        model=collected.model,
        recipe=RecipeSections(
            dataclasses.asdict(recipe.model),
            dataclasses.asdict(recipe.world),
            dataclasses.asdict(recipe.evaluate),
            dataclasses.asdict(recipe.suite),
        ),
        compositions=collected.results,
        composability=collected.composability,
        prompts=collected.prompts,
    )


def environment() -> Environment:
    """Return what the numbers may depend on besides the recipe. Imports none of the packages."""
    packages = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    return Environment(platform.python_version(), platform.platform(), platform.machine(), available_cores(), packages)


def write(path: Path, report: Report) -> None:
    """Write `report` to `path` at once: a reader finds the old file or the whole new one."""
    write_text(path, encode(report, indent=1) + "\n")


def _fullness(record: CompositionResult) -> tuple[int, int, int]:
    return len(record.gates), len(record.measurements), len(record.steps)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def now() -> str:
    """Return the time as reports give it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
