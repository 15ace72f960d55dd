"""Collect the results of all processes, and make and write the JSON report."""

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
    """Results that this process has, from its own tests or its workers."""

    model: Model | None = None
    records: dict[str, CompositionResult] = dataclasses.field(default_factory=dict)
    """By composition id."""
    composability: Composability | None = None
    prompts: tuple[Prompts, ...] = ()
    """Prompts of the samples; see `report.prompts`."""
    late: tuple[str, ...] = ()
    """Messages of paired gates that failed only when all were judged together."""
    shard: Shard | None = None
    """The shard of the run, if it has several."""
    plan: Plan | None = None
    """What the whole run plans to test; see `report.planned`."""

    @property
    def results(self) -> tuple[CompositionResult, ...]:
        """The results in order of arrival."""
        return tuple(self.records.values())

    def complete(self, seed: int, *, part: bool = False, metrics: Collection[str] | None = None) -> None:
        """Judge paired gates together and compute composability; call it when all results are here.

        `part`: these are the results of one shard. `metrics` limits composability to these metrics.
        """
        if self.records:
            self._settle(part=part)
            self.composability = composability(self.results, seed, metrics)

    def add(self, message: Message) -> None:
        """Add a result; of two results of a composition, keep the one with more gates and measurements.

        Two workers may both have measured the base model, but only one ran its test and has gates.
        """
        record = message.composition
        self.model = self.model or message.model
        before = self.records.get(record.id)
        if before is None or _fullness(record) >= _fullness(before):
            self.records[record.id] = record

    def _settle(self, *, part: bool) -> None:
        """Judge the paired gates of all results together and record late failures in `late`.

        Gates were first judged before all results were known; see `gate.settle`. A shard keeps the number of gates
        planned for the whole run.
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


def make_report(
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
    """Return platform and package versions, without importing the packages."""
    packages = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    return Environment(platform.python_version(), platform.platform(), platform.machine(), available_cores(), packages)


def write(path: Path, report: Report) -> None:
    """Write `report` to `path` atomically."""
    write_text(path, encode(report, indent=1) + "\n")


def _fullness(record: CompositionResult) -> tuple[int, int, int, bool]:
    return len(record.gates), len(record.measurements), len(record.steps), record.export is not None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def now() -> str:
    """Return the current time in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
