"""The report of a run: one JSON document, in the schema of report-1.schema.json."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lmcompose.parallel.threads import available_cores
from pytest_lmcompose.report.composability import composability
from pytest_lmcompose.report.files import write_text
from pytest_lmcompose.report.record import plain, settle

if TYPE_CHECKING:
    from pytest_lmcompose.parallel.shard import Shard
    from pytest_lmcompose.recipe import Recipe

SCHEMA_VERSION = 1
SCHEMA_MINOR = 4
"""Counts what version 1 gained: readers of an earlier one find all that they know."""
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

    model: dict[str, Any] | None = None
    records: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By composition id."""
    composability: dict[str, Any] | None = None
    prompts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What the samples asked; see `report.prompts`."""
    late: list[str] = dataclasses.field(default_factory=list)
    """Messages of paired gates that failed when all were judged together."""
    shard: Shard | None = None
    """The part of a run that this is."""

    def complete(self, seed: int, *, part: bool = False, metrics: Collection[str] | None = None) -> None:
        """Judge and compute what takes all records, once they are here; those of a part of a run as such.

        Composability is computed of `metrics`, where these are all that will be shown of it.
        """
        if self.records:
            self.late = settle(self.records.values(), part=part)
            self.composability = plain(composability(list(self.records.values()), seed, metrics))

    def add(self, model: dict[str, Any] | None, record: dict[str, Any]) -> None:
        """Keep a record, unless a fuller one of the same composition is here already.

        Two workers may both have measured the base model; gates come only from its own test.
        """
        self.model = self.model or model
        before = self.records.get(record["id"])
        if before is None or _fullness(record) >= _fullness(before):
            self.records[record["id"]] = record


def document(
    collected: Collected, recipe: Recipe, *, seed: int, repeats: int, started: str, finished: str, status: str
) -> dict[str, Any]:
    """Return the report as plain data; `status` is finished or interrupted."""
    found: dict[str, Any] = plain(
        {
            "schema_version": SCHEMA_VERSION,
            "schema_minor": SCHEMA_MINOR,
            "status": status,
            "started": started,
            "finished": finished,
            "seed": seed,
            "repeats": repeats,
            "environment": environment(),
            **({} if collected.shard is None else {"shard": dataclasses.asdict(collected.shard)}),
            "model": collected.model,
            "recipe": {
                "model": dataclasses.asdict(recipe.model),
                "world": dataclasses.asdict(recipe.world),
                "evaluate": dataclasses.asdict(recipe.evaluate),
                "suite": dataclasses.asdict(recipe.suite),
            },
            "compositions": list(collected.records.values()),
            "composability": collected.composability,
            "prompts": collected.prompts,
        }
    )
    return found


def environment() -> dict[str, Any]:
    """Return what the numbers may depend on besides the recipe. Imports none of the packages."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": available_cores(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report` to `path` at once: a reader finds the old file or the whole new one."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def _fullness(record: Mapping[str, Any]) -> tuple[int, int, int]:
    return len(record["gates"]), len(record["measurements"]), len(record["steps"])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def now() -> str:
    """Return the time as reports give it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
