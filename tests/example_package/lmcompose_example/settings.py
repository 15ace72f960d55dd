"""Settings: frozen, every field with a default and, beside its type, the values it may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from interventions.ranges import Checked, Range


@dataclass(frozen=True)
class RepetitionSettings(Checked):
    """Continuations whose words are looked at."""

    prompts: Annotated[int, Range(1)] = 8
    """Texts, from the start, that are continued."""
    prompt_words: Annotated[int, Range(1)] = 5
    length: Annotated[int, Range(1)] = 16
    """Tokens of a continuation."""
