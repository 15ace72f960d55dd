"""The baseline: whether it is of the same model, and what gates compare with. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from interventions.checkpoint.reading import ReadingError, sources
from pytest_lmcompose.baseline.compare import other_questions, unlike
from pytest_lmcompose.baseline.storage import read_run
from pytest_lmcompose.gate.judge import Reference
from pytest_lmcompose.results import CompositionResult, Model, Report

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
UPDATE = "--lmcompose-update-baseline stores one"


@dataclass(frozen=True)
class Circumstances:
    """The model, data and seeds of the current run."""

    model: Model | None
    data: Mapping[str, str]
    """Hashes of the parts of the data; see `data.hashes`."""
    seeds: range

    @property
    def build(self) -> tuple[str | None, int | None]:
        """Architecture and number of parameters; None if unknown."""
        return (None, None) if self.model is None else (self.model.architecture, self.model.parameters)


@dataclass(frozen=True)
class Baseline:
    """A stored run."""

    path: Path
    report: Report
    passed_over: tuple[str, ...] = ()
    """Later runs, which failed."""

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a stored run; raises StorageError."""
        return cls(path, read_run(path))

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"the baseline {self.path.stem}"

    @cached_property
    def _records(self) -> dict[str, CompositionResult]:
        return self.report.by_id

    def unlike(self, architecture: str | None, parameters: int | None = None) -> str | None:
        """Return why results of a model of this build cannot be compared, and how to fix it; None if they can."""
        problem = unlike(self.report.model, architecture, parameters)
        return None if problem is None else f"it is of {problem}; compare with a run of this model ({UPDATE})"

    def reference(self, composition: str, now: Circumstances) -> Reference:
        """Return the reference of the gates of `composition`."""
        if (problem := self.unlike(*now.build)) is not None:
            return Reference(self.name, missing=problem)
        record = self._records.get(composition)
        if record is None:
            return Reference(self.name, missing=f"it has no {composition}; {UPDATE}")
        if record.status != "measured":
            reason = record.error or record.status
            return Reference(self.name, missing=f"{composition} was not measured there: {reason}; {UPDATE}")
        seeds = self.report.seeds
        others = {
            metric: why
            for metric in record.by_metric
            if (why := other_questions(metric, record.data, now.data)) is not None
        }
        drawn = seeds != now.seeds
        if drawn:
            others = {
                name: f"{why}, with {_seeds_text(now.seeds)} instead of {_seeds_text(seeds)}"
                for name, why in others.items()
            }
        return Reference(
            self.name,
            [measured.measurement() for measured in record.measurements],
            record.runs,
            unlike={} if drawn else others,
            unpaired=others if drawn else {},
        )


def architecture(config: Mapping[str, Any]) -> str:
    """Return the class, layers, width and vocabulary in a model's config as text."""
    text = config.get("text_config") or {}
    layers, width, vocabulary = (
        next((found for key in keys if (found := config.get(key, text.get(key))) is not None), "?")
        for keys in (_LAYERS, _WIDTH, ("vocab_size",))
    )
    name = (config.get("architectures") or ["?"])[0]
    return f"{name}, {layers} layers of width {width}, vocabulary of {vocabulary}"


def architecture_at(location: str) -> str | None:
    """Return the architecture of a model in a folder, None if it cannot be read, or is not a folder."""
    try:
        folder = Path(sources(location)[-1])
        return architecture(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, ReadingError):
        return None


def _seeds_text(seeds: range) -> str:
    return f"seed {seeds.start}" if len(seeds) == 1 else f"seeds {seeds.start} to {seeds.stop - 1}"
