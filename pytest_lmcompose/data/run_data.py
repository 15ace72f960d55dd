"""Sample the data of a run from a world by the run's seed. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluators.data import EditCase, Fact, Probe, Question, TuningData, UnlearningData
from interventions.types import Example, Preference, Resources
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import (
    WorldError,
    sample,
    select_edits,
)
from pytest_lmcompose.data.refusal import check_disjoint, read_prompts
from pytest_lmcompose.data.source import parse_source
from pytest_lmcompose.data.tuning import check_apart, read_examples, read_preferences
from pytest_lmcompose.data.unlearning import read_questions, read_verbatim
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

HEADING = 4
"""Words of a heading, such as "Critical reception", which texts of different articles share; WikiText marks longer ones
by equals signs."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class RunData:
    """The data that methods and evaluators read; the same for every composition of a run."""

    resources: Resources
    edits: tuple[EditCase, ...]
    facts: tuple[Fact, ...]
    """Facts about other subjects than the edited ones."""
    neighbours: tuple[Fact, ...]
    """Other facts about the edited subjects that should not change."""
    forgettable: tuple[Fact, ...]
    """Facts of the topics with forget texts, which unlearning should remove."""
    perplexity: tuple[str, ...]
    tasks: Path | None
    """Folder of the question tasks."""
    unlearning: UnlearningData = field(default_factory=UnlearningData)
    """What shows how much was forgotten and kept."""
    tuning: TuningData = field(default_factory=TuningData)
    """What shows how much was learnt from tuning."""
    refusal: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Held-out prompts by set, to measure refusal on."""


@dataclass(frozen=True)
class WorldData:
    """What a world's sources hold, before edits and facts are sampled."""

    edits: Sequence[EditCase]
    facts: Sequence[Fact]
    calibration: tuple[str, ...]
    retain: tuple[str, ...]
    forget: Mapping[str, tuple[str, ...]]
    perplexity: tuple[str, ...]
    unlearning: UnlearningData
    tuning: Mapping[str, tuple[Example, ...]]
    preferences: tuple[Preference, ...]
    heldout: TuningData
    refusal: Mapping[str, tuple[str, ...]]
    refusal_heldout: Mapping[str, tuple[str, ...]]


def load_data(world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int) -> RunData:
    """Read a world's files from `folder` and sample the run's data; see `read_world` for errors."""
    return sample_data(read_world(world, evaluate, folder), world, evaluate, folder, seed)


def read_world(world: WorldSettings, evaluate: EvaluateSettings, folder: Path) -> WorldData:
    """Read every source of a world, files from `folder`.

    Raises WorldError for missing or broken data, for a perplexity text (other than a heading) that methods read, and
    for a held-out example or preference that they read.
    """
    edits: Sequence[EditCase] = ()
    facts: Sequence[Fact] = ()
    if world.edits is not None:
        with _named("edits"):
            edits = read_edits(
                world.edits, world.edits_schema, strip_nq=world.strip_nq, ask_as=world.ask_as, folder=folder
            )
    if world.facts is not None:
        with _named("facts"):
            facts = read_facts(world.facts, folder)
    found = WorldData(
        edits,
        facts,
        _texts(world, folder, "calibration"),
        _texts(world, folder, "retain"),
        _text_sets(world, folder, "forget"),
        _texts(world, folder, "perplexity")[: evaluate.texts],
        _unlearning(world, folder) if evaluate.unlearning else UnlearningData(),
        _example_sets(world, folder, "tuning"),
        _preferences(world, folder, "preferences"),
        _heldout(world, folder) if evaluate.tuning else TuningData(),
        _prompt_sets(world, folder, "refusal"),
        _prompt_sets(world, folder, "refusal_heldout") if evaluate.refusal else {},
    )
    _check_apart(found, folder)
    check_disjoint({"refusal": found.refusal, "refusal_heldout": found.refusal_heldout})
    return found


def sample_data(found: WorldData, world: WorldSettings, evaluate: EvaluateSettings, folder: Path, seed: int) -> RunData:
    """Sample the data of one repeat; raises WorldError if there are too few edits."""
    edits: tuple[EditCase, ...] = ()
    if world.edits is not None:
        name = f"{folder}: {parse_source(world.edits).name}"
        edits = select_edits(found.edits, evaluate.edits, seed, name)
    resources = Resources(
        edits=tuple(record.edit for record in edits),
        calibration=found.calibration,
        forget=found.forget,
        retain=found.retain,
        tuning=found.tuning,
        preferences=found.preferences,
        refusal=found.refusal,
    )
    facts, neighbours, forgettable = _facts(found.facts, world, evaluate, seed, edits)
    tasks = folder / world.tasks if world.tasks is not None else None
    measured = (found.perplexity, tasks, found.unlearning, found.heldout, found.refusal_heldout)
    return RunData(resources, edits, facts, neighbours, forgettable, *measured)


def _check_apart(found: WorldData, folder: Path) -> None:
    """Raise WorldError if methods read what evaluators measure on."""
    perplexity = found.perplexity
    for name, texts in (("retain", found.retain), ("calibration", found.calibration)):
        if shared := {text for text in set(texts) & set(perplexity) if not _is_heading(text)}:
            raise WorldError(
                f"{folder}: {len(shared)} of the {name} texts are perplexity texts too, for instance "
                f"{min(shared)[:60]!r}; a method must not be tested on its own training data"
            )
    examples = [example for one in found.tuning.values() for example in one]
    for name, heldout in found.heldout.sets.items():
        check_apart(examples, heldout, f"tuning_heldout.{name}")
    check_apart(found.preferences, found.heldout.preferences, "preferences_heldout")


def _is_heading(text: str) -> bool:
    stripped = text.strip()
    return len(_WORD.findall(text)) <= HEADING or (stripped.startswith("= ") and stripped.endswith(" ="))


def _texts(world: WorldSettings, folder: Path, key: str) -> tuple[str, ...]:
    source = getattr(world, key)
    return _read_texts(world, key, source, folder) if source is not None else ()


def _text_sets(world: WorldSettings, folder: Path, key: str) -> dict[str, tuple[str, ...]]:
    return {name: _read_texts(world, f"{key}.{name}", source, folder) for name, source in getattr(world, key).items()}


def _prompt_sets(world: WorldSettings, folder: Path, key: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, source in getattr(world, key).items():
        with _named(f"{key}.{name}"):
            found[name] = read_prompts(source, name, folder)
    return found


def _read_texts(world: WorldSettings, key: str, source: Any, folder: Path) -> tuple[str, ...]:
    with _named(key):
        parts = [
            read_texts(one, folder, world.qa_template) for one in (source if isinstance(source, list) else [source])
        ]
    return tuple(text for row in itertools.zip_longest(*parts) for text in row if text is not None)


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


def _heldout(world: WorldSettings, folder: Path) -> TuningData:
    return TuningData(
        _example_sets(world, folder, "tuning_heldout"), _preferences(world, folder, "preferences_heldout")
    )


def _example_sets(world: WorldSettings, folder: Path, key: str) -> dict[str, tuple[Example, ...]]:
    found = {}
    for name, source in getattr(world, key).items():
        with _named(f"{key}.{name}"):
            found[name] = read_examples(source, folder)
    return found


def _preferences(world: WorldSettings, folder: Path, key: str) -> tuple[Preference, ...]:
    if (source := getattr(world, key)) is None:
        return ()
    with _named(key):
        return read_preferences(source, folder)


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
    known: Sequence[Fact],
    world: WorldSettings,
    evaluate: EvaluateSettings,
    seed: int,
    edits: tuple[EditCase, ...],
) -> tuple[tuple[Fact, ...], ...]:
    """Return samples of `RunData.facts`, `neighbours` and `forgettable`."""
    edited = {record.subject: record for record in edits}
    pools: dict[str, list[Fact]] = {"facts": [], "neighbours": [], "forgettable": []}
    for fact in known:
        record = edited.get(fact.subject)
        if fact.topic in world.forget:
            pools["forgettable"].append(fact)
        elif record is None:
            pools["facts"].append(fact)
        elif record.truth and fact.answer not in _outdated(record):
            pools["neighbours"].append(fact)
    return tuple(tuple(sample(pool, evaluate.facts, seed, name)) for name, pool in pools.items())


def _outdated(record: EditCase) -> set[str]:
    """Return the answers that an edit makes wrong: the replaced one, and those that follow from it."""
    return {record.truth, *(probe.rival for probe in record.portability)}
