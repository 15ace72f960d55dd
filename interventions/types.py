"""Types that all interventions share: edits, examples, resources and step reports. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interventions.known_grids import KnownGrid


class InterventionError(Exception):
    """A step that cannot run, or that broke its promise.

    The message names the record, layer or setting at fault and the fix.
    """


@dataclass(frozen=True)
class Edit:
    """One fact to rewrite: after `prompt`, the model should say `target`.

    `prompt` contains `subject` verbatim; both are plain text without special tokens,
    and `target` has no leading space.
    """

    prompt: str
    subject: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What stands before a prompt in a conversation."""

    chat: bool = False
    """Whether prompt and answer are turns of a conversation, which the tokenizer's chat template writes."""
    system: str = ""
    """The system's turn; empty: none."""
    earlier: tuple[tuple[str, str], ...] = ()
    """Earlier turns: each a prompt with its answer."""


@dataclass(frozen=True)
class Example(Turns):
    """A prompt with the answer to learn."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Preference(Turns):
    """A prompt with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Resources:
    """The texts that a step may read; a method takes what it needs and ignores the rest."""

    edits: tuple[Edit, ...] = ()
    calibration: tuple[str, ...] = ()
    forget: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    retain: tuple[str, ...] = ()
    tuning: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    """Prompts and answers by set."""
    preferences: tuple[Preference, ...] = ()
    refusal: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Prompts by set, harmful and harmless, whose difference is a direction."""


@dataclass
class StepReport:
    """The result of one step, stored in the run's report as plain JSON."""

    method: str
    settings: dict[str, Any]
    changed: tuple[str, ...]
    """Names of the parameters whose values changed, sorted."""
    details: dict[str, Any]
    """Details from the method: losses, scales, fall-backs. Plain data only."""
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    """Peak resident memory of the process on CPU; where GPUs compute, peak allocated memory, of the one with most."""
    promises: Mapping[str, float] = field(default_factory=dict)
    """Values of metrics that the settings promise."""
    rounding: Mapping[str, Any] | None = None
    """What the model rounds while it runs, after the step: `interventions.rounding.Rounding.plain`; None: nothing."""
    grids: Mapping[str, KnownGrid] = field(default_factory=dict)
    """How a checkpoint stored the weights that the step took from it, by parameter name."""
