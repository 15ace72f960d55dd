"""Input data of the evaluators. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from interventions.tokens import Chat as Chat

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """A prompt and its expected answer, without a leading space."""

    prompt: str
    answer: str
    rival: str = ""
    """The competing answer, such as the old one before an edit; empty if unknown."""
    kind: str = ""
    """Which kind of prompt it is, if the dataset has several."""


@dataclass(frozen=True)
class EditCase:
    """One edit and its test prompts.

    The model should answer `target` to `prompt` and `paraphrases`; the unchanged answer to
    `locality` prompts, which are about something else; and what follows from the edit to
    `portability` prompts, whose rival is the answer before the edit.
    """

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    truth: str = ""
    """The answer before the edit; empty if unknown."""


@dataclass(frozen=True)
class UneditedAnswers:
    """The ids that the unedited model generated for each locality probe."""

    generated: Mapping[Probe, tuple[int, ...]]


@dataclass(frozen=True)
class Fact:
    """A prompt, its true answer without a leading space, its relation and split."""

    prompt: str
    answer: str
    relation: str
    split: str = ""


@dataclass(frozen=True)
class EvaluationData:
    """The data of a run for its evaluators: equal for every state, with one object per state."""

    edits: tuple[EditCase, ...]
    """The run's edits, whether or not this state has them."""
    facts: tuple[Fact, ...]
    """Facts unrelated to the edits."""
    texts: tuple[str, ...]
    """Running text that no method uses."""
    batch_size: int
    """Sequences per forward pass."""
    neighbours: tuple[Fact, ...] = ()
    """Other facts about the edited subjects, which should not change."""
    forgettable: tuple[Fact, ...] = ()
    """Facts that unlearning should remove."""
    unedited: UneditedAnswers | None = None
    """The base model's answers to the locality prompts."""
    task_folder: Path | None = None
    """Folder of the world's question tasks."""
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Pools of question tasks: tasks, groups or tags by the name of the pool."""
    hazardous: tuple[str, ...] = ()
    """Pools with knowledge that unlearning should remove."""
    trust_code: bool = False
    """Whether task files may run code."""
    chat: Chat | None = None
    """How prompts are put into the chat template; None: they are read as they stand."""
    _shared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of `make`, computed once per state, so that evaluators can share a pass."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]  # type: ignore[no-any-return]
