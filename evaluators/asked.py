"""The data that evaluators ask a model about. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer it should get; the answer carries no leading space."""

    prompt: str
    answer: str
    rival: str = ""
    """What the answer is held against: what was true before an edit. Empty where nothing is known."""
    kind: str = ""
    """Where a data set has several kinds of such prompts: which."""


@dataclass(frozen=True)
class EditCase:
    """One edit and the prompts that judge it.

    After `prompt` and after each of `paraphrases` the model should say `target`; after each
    prompt of `locality`, which is about something else, what was true before; after each of
    `portability` what follows from the edit, with what followed before it as the probe's rival.
    """

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    truth: str = ""
    """What was true before the edit; empty where it is not known."""


@dataclass(frozen=True)
class UneditedAnswers:
    """What the unedited model generated for each locality probe."""

    generated: Mapping[Probe, tuple[int, ...]]


@dataclass(frozen=True)
class Fact:
    """A prompt, its true answer without a leading space, and where the fact belongs."""

    prompt: str
    answer: str
    relation: str
    split: str = ""


@dataclass(frozen=True)
class Asked:
    """What a run offers to its evaluators: the same data for every state, one `Asked` per state."""

    edits: tuple[EditCase, ...]
    """The run's edits, made in this state or not."""
    facts: tuple[Fact, ...]
    """Facts that no edit is about."""
    texts: tuple[str, ...]
    """Running text that no method has read."""
    batch_size: int
    """Sequences to read at a time."""
    neighbours: tuple[Fact, ...] = ()
    """Other facts about the edited subjects, which should stay."""
    forgettable: tuple[Fact, ...] = ()
    """Facts that unlearning should remove."""
    unedited: UneditedAnswers | None = None
    """The base model's answers to the locality prompts."""
    task_folder: Path | None = None
    """Folder of the world's question tasks."""
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Pools of question tasks: a name, and its tasks, groups or tags."""
    hazardous: tuple[str, ...] = ()
    """Pools of knowledge that unlearning should remove."""
    trust_code: bool = False
    """Whether task files of the folder may run code."""
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of `make`, computed once per state: evaluators that need the same pass share it."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found
