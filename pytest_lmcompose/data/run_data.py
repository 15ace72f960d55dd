"""Sample the data of a run from a world by the run's seed. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluators.data import Probe, Question, UnlearningData
from interventions.types import Resources
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import (
    EditRecord,
    FactRecord,
    WorldError,
    sample,
    select_edits,
)
from pytest_lmcompose.data.source import parse_source
from pytest_lmcompose.data.unlearning import read_questions, read_verbatim
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

HEADING = 4
"""Words of a heading, such as "Critical reception", which texts of different articles share."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class RunData:
    """The data that methods and evaluators read; the same for every composition of a run."""

    resources: Resources
    edits: tuple[EditRecord, ...]
    facts: tuple[FactRecord, ...]
    """Facts about other subjects than the edited ones."""
    neighbours: tuple[FactRecord, ...]
    """Other facts about the edited subjects that should not change."""
    forgettable: tuple[FactRecord, ...]
    """Facts of the topics with forget texts, which unlearning should remove."""
    perplexity: tuple[str, ...]
    tasks: Path | None
    """Folder of the question tasks."""
    unlearning: UnlearningData = field(default_factory=UnlearningData)
    """What shows how much was forgotten and kept."""


def load_data(world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int) -> RunData:
    """Read a world's files from `folder` and sample the run's data.

    Raises WorldError for missing or broken data, and for a perplexity text (other than a heading) that methods read.
    """
    edits: tuple[EditRecord, ...] = ()
    if world.edits is not None:
        with _named("edits"):
            records = read_edits(
                world.edits, world.edits_schema, strip_nq=world.strip_nq, ask_as=world.ask_as, folder=folder
            )
        edits = select_edits(records, evaluate.edits, seed, f"{folder}: {parse_source(world.edits).name}")
    resources = Resources(
        edits=tuple(record.edit for record in edits),
        calibration=_texts(world, folder, "calibration"),
        forget=_text_sets(world, folder, "forget"),
        retain=_texts(world, folder, "retain"),
    )
    facts, neighbours, forgettable = _facts(world, evaluate, folder, seed, edits)
    perplexity = _texts(world, folder, "perplexity")[: evaluate.texts]
    for name, texts in (("retain", resources.retain), ("calibration", resources.calibration)):
        if shared := {text for text in set(texts) & set(perplexity) if len(_WORD.findall(text)) > HEADING}:
            raise WorldError(
                f"{folder}: {len(shared)} of the {name} texts are perplexity texts too, for instance "
                f"{min(shared)[:60]!r}; a method must not be tested on its own training data"
            )
    tasks = folder / world.tasks if world.tasks is not None else None
    unlearning = _unlearning(world, folder) if evaluate.unlearning else UnlearningData()
    return RunData(resources, edits, facts, neighbours, forgettable, perplexity, tasks, unlearning)


def _texts(world: WorldSettings, folder: Path, key: str) -> tuple[str, ...]:
    source = getattr(world, key)
    return _read_texts(world, key, source, folder) if source is not None else ()


def _text_sets(world: WorldSettings, folder: Path, key: str) -> dict[str, tuple[str, ...]]:
    return {name: _read_texts(world, f"{key}.{name}", source, folder) for name, source in getattr(world, key).items()}


def _read_texts(world: WorldSettings, key: str, source: Any, folder: Path) -> tuple[str, ...]:
    with _named(key):
        return read_texts(source, folder, world.qa_template)


def _unlearning(world: WorldSettings, folder: Path) -> UnlearningData:
    verbatim: tuple[Probe, ...] = ()
    if world.verbatim is not None:
        with _named("verbatim"):
            verbatim = read_verbatim(world.verbatim, folder)
    examples = _question_sets(world, folder, "knowledge_examples", {})
    return UnlearningData(
        _question_sets(world, folder, "qa", {}),
        _question_sets(world, folder, "knowledge", examples),
        verbatim,
        _text_sets(world, folder, "membership"),
    )


def _question_sets(
    world: WorldSettings, folder: Path, key: str, examples: Mapping[str, tuple[Question, ...]]
) -> dict[str, tuple[Question, ...]]:
    found = {}
    for name, source in getattr(world, key).items():
        with _named(f"{key}.{name}"):
            shown = examples.get(name, ())
            found[name] = read_questions(source, folder, template=world.qa_template, examples=shown)
    return found


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Name the key of the world in errors of its data."""
    try:
        yield
    except WorldError as error:
        raise WorldError(f"world.{key}: {error}") from None


def _facts(
    world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int, edits: tuple[EditRecord, ...]
) -> tuple[tuple[FactRecord, ...], ...]:
    """Return samples of `RunData.facts`, `neighbours` and `forgettable`."""
    if world.facts is None:
        return (), (), ()
    edited = {record.edit.subject: record for record in edits}
    pools: dict[str, list[FactRecord]] = {"facts": [], "neighbours": [], "forgettable": []}
    with _named("facts"):
        known = read_facts(world.facts, folder)
    for fact in known:
        record = edited.get(fact.subject)
        if fact.topic in world.forget:
            pools["forgettable"].append(fact)
        elif record is None:
            pools["facts"].append(fact)
        elif record.truth and fact.answer not in _outdated(record):
            pools["neighbours"].append(fact)
    return tuple(tuple(sample(pool, evaluate.facts, seed, name)) for name, pool in pools.items())


def _outdated(record: EditRecord) -> set[str]:
    """Return the answers that an edit makes wrong: the replaced one, and those that follow from it."""
    return {record.truth, *(probe.before for probe in record.portability)}
