"""The data of one run: which edits, facts and texts, drawn from a world by the run's seed. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings


@dataclass(frozen=True)
class RunData:
    """What the methods read and the evaluators ask; the same for every composition of a run."""

    resources: Resources
    edits: tuple[EditRecord, ...]
    facts: tuple[FactRecord, ...]
    """Of subjects that no edit is about."""
    neighbours: tuple[FactRecord, ...]
    """Other facts of the edited subjects, but for those that should change with the edit."""
    forgettable: tuple[FactRecord, ...]
    """Of the topics that there is forget text of: unlearning is to remove them."""
    perplexity: tuple[str, ...]
    tasks: Path | None
    """Folder of the question tasks."""


def load_data(world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int) -> RunData:
    """Read a world's files from `folder` and draw the run's samples.

    Raises WorldError for a file that is missing or broken, or that shares a text with the
    perplexity text.
    """
    edits: tuple[EditRecord, ...] = ()
    if world.edits is not None:
        records = read_edits(
            world.edits, world.edits_schema, strip_nq=world.strip_nq, ask_as=world.ask_as, folder=folder
        )
        edits = select_edits(records, evaluate.edits, seed, f"{folder}: {parse_source(world.edits).name}")
    resources = Resources(
        edits=tuple(record.edit for record in edits),
        calibration=_texts(folder, world.calibration),
        forget={domain: read_texts(name, folder) for domain, name in world.forget.items()},
        retain=_texts(folder, world.retain),
    )
    facts, neighbours, forgettable = _facts(world, evaluate, folder, seed, edits)
    perplexity = _texts(folder, world.perplexity)[: evaluate.texts]
    for name, texts in (("retain", resources.retain), ("calibration", resources.calibration)):
        if shared := set(texts) & set(perplexity):
            raise WorldError(
                f"{folder}: {len(shared)} of the {name} texts are perplexity texts too, for instance "
                f"{min(shared)[:60]!r}; a method would be judged on what it was fitted to"
            )
    tasks = folder / world.tasks if world.tasks is not None else None
    return RunData(resources, edits, facts, neighbours, forgettable, perplexity, tasks)


def _texts(folder: Path, name: Any) -> tuple[str, ...]:
    return read_texts(name, folder) if name is not None else ()


def _facts(
    world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int, edits: tuple[EditRecord, ...]
) -> tuple[tuple[FactRecord, ...], ...]:
    """Return samples of the facts of other subjects, of the edited subjects' other facts, and of those to forget."""
    if world.facts is None:
        return (), (), ()
    edited = {record.edit.subject: record for record in edits}
    others: list[FactRecord] = []
    neighbours: list[FactRecord] = []
    forgettable: list[FactRecord] = []
    for fact in read_facts(world.facts, folder):
        record = edited.get(fact.subject)
        if fact.topic in world.forget:
            forgettable.append(fact)
        elif record is None:
            others.append(fact)
        elif record.truth and fact.answer not in _outdated(record):
            neighbours.append(fact)
    pools = {"facts": others, "neighbours": neighbours, "forgettable": forgettable}
    return tuple(tuple(sample(pool, evaluate.facts, seed, name)) for name, pool in pools.items())


def _outdated(record: EditRecord) -> set[str]:
    """Return the answers that an edit makes wrong: the one rewritten, and those that followed from it."""
    return {record.truth, *(probe.before for probe in record.portability)}
