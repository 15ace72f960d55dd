"""Settings: frozen, flat, every field with a default; the recipe checks names and types against them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipSettings:
    """Outlying weights of each linear layer, cut to a number of standard deviations."""

    deviations: float = 3.0
    """Weights further from zero than so many standard deviations of their layer are cut."""


@dataclass(frozen=True)
class RepetitionSettings:
    """Continuations whose words are looked at."""

    prompts: int = 8
    """Texts, from the start, that are continued."""
    prompt_words: int = 5
    length: int = 16
    """Tokens of a continuation."""
