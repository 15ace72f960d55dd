"""Input data of the evaluators. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from interventions.tokens import Chat as Chat
from interventions.types import Edit, Example, Preference

if TYPE_CHECKING:
    from evaluators.measurement import Measurement
    from evaluators.predictions import Predictions
    from interventions.known_grids import KnownGrid

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

    @classmethod
    def of(
        cls,
        edit: Edit,
        paraphrases: tuple[str, ...] = (),
        locality: tuple[Probe, ...] = (),
        truth: str = "",
        portability: tuple[Probe, ...] = (),
    ) -> EditCase:
        """Return the case of an edit."""
        return cls(edit.subject, edit.prompt, edit.target, paraphrases, locality, portability, truth)

    @property
    def edit(self) -> Edit:
        """What an intervention is to do."""
        return Edit(self.prompt, self.subject, self.target)


@dataclass(frozen=True)
class UneditedAnswers:
    """What the unedited model answers."""

    generated: Mapping[Probe, tuple[int, ...]]
    """The ids that it generated for each locality probe."""
    margins: tuple[float, ...] = ()
    """log p(chosen) - log p(rejected) of each held-out preference, in nats."""
    predictions: Predictions | None = None
    """What it predicts for each token of the running text."""


@dataclass(frozen=True)
class Fact:
    """A prompt, its true answer without a leading space, its relation, its split and whom it is about."""

    prompt: str
    answer: str
    relation: str
    split: str = ""
    subject: str = ""

    @property
    def topic(self) -> str:
        """The topic of the relation: `venomcraft` for `venomcraft/antidote`."""
        return self.relation.partition("/")[0]


@dataclass(frozen=True)
class Question:
    """A question with its true answer, and other answers to compare it with."""

    question: str
    prompt: str
    """The question in its template, after the examples if there are any; the answer follows."""
    answer: str
    paraphrase: str = ""
    """The true answer in other words; empty if unknown."""
    wrong: tuple[str, ...] = ()
    """False answers of the same form."""
    examples: tuple[tuple[str, str], ...] = ()
    """Questions and answers that `prompt` shows before the question."""

    def asked(self, chat: Chat | None) -> str:
        """Return what is asked: the bare question for the user's turn of a chat template, otherwise `prompt`."""
        return self.prompt if chat is None else self.question


@dataclass(frozen=True)
class UnlearningData:
    """Data that shows what a model forgot, and what it kept."""

    qa: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)
    """TOFU's questions by set: forget, retain, real_authors, world_facts."""
    knowledge: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)
    """MUSE's questions by set: forget, retain."""
    verbatim: tuple[Probe, ...] = ()
    """MUSE's beginnings of texts to forget, and how they go on."""
    membership: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """MUSE's texts by set: forget, which the model was trained on, and holdout, which it never saw."""


@dataclass(frozen=True)
class TuningData:
    """Held-out data that shows what a model was tuned to."""

    sets: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    """Prompts with the right answers, by set."""
    preferences: tuple[Preference, ...] = ()


@dataclass(frozen=True)
class RetainReference:
    """Results of a model that was trained without the data to forget."""

    log_truth_ratios: tuple[float, ...] = ()
    """The logarithm of the truth ratio of each question of the set `forget`; empty without such questions."""
    auc: float | None = None
    """How well the Min-K% probability tells texts to forget from texts never seen; None without such texts."""


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
    """The base model's answers to the locality prompts, its preferences and its predictions."""
    is_base: bool = False
    """Whether the state is the very model that `unedited` is of."""
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
    unlearning: UnlearningData = field(default_factory=UnlearningData)
    tuning: TuningData = field(default_factory=TuningData)
    sequence: tuple[int, ...] = ()
    """Numbers of edits that the state's last editing step made at once, batch by batch; empty without such a step."""
    retained: RetainReference | None = None
    """Results of the retain model, if there is one."""
    refusal: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Held-out prompts by set: harmful and harmless."""
    grids: Mapping[str, KnownGrid] = field(default_factory=dict)
    """How the model's checkpoint stored its quantised weights, by parameter name."""
    enough: Callable[[Sequence[Measurement]], bool] | None = None
    """Whether no more questions are needed after these; None: all are."""
    _shared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of `make`, computed once per state, so that evaluators can share a pass."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]  # type: ignore[no-any-return]
