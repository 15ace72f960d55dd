"""The services of a run that a method may use. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from interventions.known_grids import KnownGrid
    from interventions.shared_statistics import SharedStatistics


class OtherState(NamedTuple):
    """The weights of another composition of the run."""

    parameters: Mapping[str, torch.Tensor]
    """By name, on the host; read-only. They have a weight of the head only if it is not that of the embeddings."""
    state_hash: str


def silent(_: object) -> None:
    """Ignore a message."""


@dataclass(frozen=True)
class Context:
    """The services of a run that a method may use."""

    seed: int = 0
    progress: Callable[[str], None] = silent
    """Reports progress in one line."""
    warn: Callable[[str], None] = silent
    """Adds a warning to the report, such as a fall-back or a skipped layer."""
    already: Callable[[str], None] = silent
    """Explains why this step may change no weight: the message becomes a warning. Without it, such a step fails."""
    statistics: SharedStatistics | None = None
    """Statistics shared between steps that start from the same state of the model."""
    folder: Path = Path()
    """Where relative paths in settings start."""
    stored: Callable[[Mapping[str, KnownGrid]], None] = silent
    """Reports how a checkpoint stored weights that the step takes from it, by parameter name."""
    states: Mapping[str, OtherState] = field(default_factory=dict)
    """The states of the `compositions` in the settings, by the text that names them; none outside of a run."""

    def generator(self, purpose: str) -> torch.Generator:
        """Return a new CPU generator whose seed depends on the run's seed and `purpose` alone."""
        import torch

        digest = hashlib.sha256(f"{self.seed}\n{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
