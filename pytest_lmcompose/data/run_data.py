"""Sample the data of a run from a world by the run's seed. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from interventions.types import Resources
from pytest_lmcompose.data.readers import read_edits
from pytest_lmcompose.data.records import (
    EditRecord,
    FactRecord,
    WorldError,
    read_facts,
    read_texts,
    sample,
    select_edits,
)
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings


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


def load_data(world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int) -> RunData:
    """Read a world's files from `folder` and sample the run's data.

    Raises WorldError for a missing or broken file, and for a perplexity text that methods read too.
    """
    edits: tuple[EditRecord, ...] = ()
    if world.edits is not None:
        path = folder / world.edits
        records = read_edits(path, world.edits_schema, strip_nq=world.strip_nq, ask_as=world.ask_as)
        edits = select_edits(records, evaluate.edits, seed, str(path))
    resources = Resources(
        edits=tuple(record.edit for record in edits),
        calibration=_texts(folder, world.calibration),
        forget={domain: read_texts(folder / name) for domain, name in world.forget.items()},
        retain=_texts(folder, world.retain),
    )
    facts, neighbours, forgettable = _facts(world, evaluate, folder, seed, edits)
    perplexity = _texts(folder, world.perplexity)[: evaluate.texts]
    for name, texts in (("retain", resources.retain), ("calibration", resources.calibration)):
        if shared := set(texts) & set(perplexity):
            raise WorldError(
                f"{folder}: {len(shared)} of the {name} texts are perplexity texts too, for instance "
                f"{min(shared)[:60]!r}; a method must not be tested on its own training data"
            )
    tasks = folder / world.tasks if world.tasks is not None else None
    return RunData(resources, edits, facts, neighbours, forgettable, perplexity, tasks)


def _texts(folder: Path, name: str | None) -> tuple[str, ...]:
    return read_texts(folder / name) if name is not None else ()


def _facts(
    world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int, edits: tuple[EditRecord, ...]
) -> tuple[tuple[FactRecord, ...], ...]:
    """Return samples of `RunData.facts`, `neighbours` and `forgettable`."""
    if world.facts is None:
        return (), (), ()
    edited = {record.edit.subject: record for record in edits}
    pools: dict[str, list[FactRecord]] = {"facts": [], "neighbours": [], "forgettable": []}
    for fact in read_facts(folder / world.facts):
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
