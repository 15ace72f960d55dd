"""tinyworld's model with everything needed to measure it, and the tables of measured properties."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compositions.tinyworld.relations import HAZARDOUS, TUNING
from evaluators import (
    EditCase,
    Fact,
    Measurement,
    capture_unedited,
    measure_editing,
    measure_perplexity,
    measure_questions,
    measure_recall,
    measure_tuning,
    pool,
    preference_margins,
    preference_wins,
)
from interventions import Resources, StepReport, apply
from pytest_lmcompose.build.load import choose_device, load_model
from pytest_lmcompose.composition import parse
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import select_edits
from pytest_lmcompose.data.tuning import read_examples, read_preferences
from pytest_lmcompose.recipe import load_recipe

SUITE = Path(__file__).resolve().parents[1]
DATA = SUITE / "tinyworld" / "data"
EDITS = 20
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_HEAD = "| what | value ± standard error | n | needed | met |\n|---|---|---|---|---|"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One row of a table: a measured value, its standard error and its bounds."""

    name: str
    value: float
    stderr: float | None
    n: int
    least: float | None = None
    most: float | None = None

    @staticmethod
    def mean(name: str, values: Sequence[float], least: float | None = None, most: float | None = None) -> Row:
        """Return the row of a mean over repeats, with the standard error between repeats."""
        noise = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return Row(name, statistics.fmean(values), noise, len(values), least, most)

    @staticmethod
    def of(name: str, measured: Measurement, least: float | None = None, most: float | None = None) -> Row:
        """Return the row of one measurement."""
        return Row(name, measured.value, measured.stderr, measured.n, least, most)

    def markdown(self) -> str:
        """Return the row as Markdown."""
        noise = "" if self.stderr is None else f" ± {self.stderr:.3f}"
        bounds = [f">= {self.least}"] * (self.least is not None) + [f"<= {self.most}"] * (self.most is not None)
        within = (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)
        met = ("yes" if within else "**no**") if bounds else ""
        return f"| {self.name} | {self.value:.3f}{noise} | {self.n} | {', '.join(bounds)} | {met} |"


def around_table(path: Path) -> tuple[str, str]:
    """Return the text before and after the table of a document; raise ValueError if it has no marks for one."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: expected the marks {BEGIN} and {END} once each")
    return text.split(BEGIN)[0], text.split(END)[1]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows between the marks of a document."""
    before, after = around_table(path)
    table = "\n".join([_HEAD, *(row.markdown() for row in rows)])
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


class Bench:
    """tinyworld's model on the CPU, the data of its methods, and what to measure."""

    def __init__(self) -> None:
        self.recipe = load_recipe(SUITE / "conf")
        loaded = load_model(self.recipe.model, str(SUITE / self.recipe.model.path), choose_device("cpu"))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._base = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._edits = read_edits(DATA / "zsre.json", "zsre", strip_nq=True)
        self.facts = read_facts(DATA / "facts.jsonl")
        self._texts = Resources(
            calibration=read_texts(DATA / "calibration.jsonl"),
            forget={domain: read_texts(DATA / f"forget-{domain}.jsonl") for domain in HAZARDOUS},
            retain=read_texts(DATA / "retain.jsonl"),
            tuning={name: read_examples(DATA / f"tuning-{name}.jsonl") for name in TUNING},
            preferences=read_preferences(DATA / "preferences.jsonl"),
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the base model."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._base[name])

    def apply(self, composition: str, seed: int = 0, **resources: Any) -> list[StepReport]:
        """Apply `composition` to the base model."""
        self.restore()
        data = Resources(**{**vars(self._texts), **resources})
        return [
            apply(self.model, self.tokenizer, step.method, self.recipe.settings(step), resources=data, seed=seed)
            for step in parse(composition).steps
        ]

    def edits(self, seed: int) -> tuple[EditCase, ...]:
        """Return the set of edits that `seed` selects."""
        return select_edits(self._edits, EDITS, seed, str(DATA / "zsre.json"))

    def edit(self, method: str, seed: int) -> dict[str, float]:
        """Make the edits of `seed` in the base model and return the editing metrics."""
        cases = self.edits(seed)
        self.restore()
        unedited = capture_unedited(self.model, self.tokenizer, cases)
        self.apply(method, seed, edits=[case.edit for case in cases])
        return {m.metric: m.value for m in measure_editing(self.model, self.tokenizer, cases, unedited=unedited)}

    def margins(self) -> tuple[float, ...]:
        """Return the model's margins of the held-out preferences."""
        return preference_margins(self.model, self.tokenizer, read_preferences(DATA / "preferences-heldout.jsonl"))

    def tuned(self, margins: Sequence[float]) -> dict[str, float]:
        """Measure the sets to tune on and the preferences, with the base model's `margins`."""
        found = [preference_wins(self.margins(), margins)]
        for name in TUNING:
            heldout = read_examples(DATA / f"tuning-{name}-heldout.jsonl")
            found += measure_tuning(self.model, self.tokenizer, name, heldout)
        return {measured.metric: measured.value for measured in found}

    def recall(self, facts: Sequence[Fact]) -> Measurement:
        """Measure exact-match accuracy on `facts`."""
        return measure_recall(self.model, self.tokenizer, facts)[0]

    def perplexity(self, split: str = "heldout") -> Measurement:
        """Measure the perplexity of the text of `split`."""
        return measure_perplexity(
            self.model, self.tokenizer, read_texts(DATA / f"perplexity-{split}.jsonl"), window=127
        )

    def questions(self, name: str, domains: Sequence[str]) -> Measurement:
        """Measure the accuracy on the questions of `domains`, as the pool `name`."""
        tasks = [f"tinyworld_{domain}" for domain in domains]
        return pool(
            name, measure_questions(self.model, self.tokenizer, tasks, task_folder=SUITE / "tinyworld" / "tasks")
        )
