"""The words that every intervention shares: what it may read, and what it reports.

Nothing here imports torch, so that recipes and plans can be checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class InterventionError(Exception):
    """A step that cannot be done, or that did not do what it promised.

    The message names the record, layer or setting at fault and what to change.
    """


@dataclass(frozen=True)
class Edit:
    """One fact to rewrite: after `prompt`, the model should say `target`.

    `subject` stands word for word in `prompt`; both are plain text without special tokens,
    and `target` carries no leading space.
    """

    prompt: str
    subject: str
    target: str


@dataclass(frozen=True)
class Resources:
    """The texts that a step may read; a method takes what it needs and ignores the rest."""

    edits: tuple[Edit, ...] = ()
    calibration: tuple[str, ...] = ()
    forget: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    retain: tuple[str, ...] = ()


@dataclass
class StepReport:
    """What one step did: kept in the run's report as plain JSON."""

    method: str
    settings: dict[str, Any]
    changed: tuple[str, ...]
    """Names of the parameters whose values changed, sorted."""
    details: dict[str, Any]
    """What the method tells of itself: losses, scales, fall-backs. Plain data only."""
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    """Peak resident memory of the process on CPU; where GPUs compute, peak allocated memory, of the one with most."""
    promises: Mapping[str, float] = field(default_factory=dict)
    """Values of metrics that the settings promise."""
