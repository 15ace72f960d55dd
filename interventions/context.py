"""What a method may use of the run around it. Importing it imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from interventions.shared_statistics import SharedStatistics


def silent(message: str) -> None:
    """Take a message and do nothing."""


@dataclass(frozen=True)
class Context:
    """What a method may use of the run around it."""

    seed: int = 0
    progress: Callable[[str], None] = silent
    """Takes one line about what is going on."""
    warn: Callable[[str], None] = silent
    """Takes a sentence that belongs in the report: a fall-back, a layer left out."""
    already: Callable[[str], None] = silent
    """Takes a sentence saying that the model already was what this step makes of it. Without it, a
    step that changes no weight fails; with it, the sentence is a warning."""
    statistics: SharedStatistics | None = None
    """What other steps from the same state of the model have collected, and where to keep more."""

    def generator(self, purpose: str) -> torch.Generator:
        """Return a new CPU generator whose seed depends on the run's seed and `purpose` alone."""
        import torch

        digest = hashlib.sha256(f"{self.seed}\n{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
