"""Settings of the built-in evaluators; the recipe's section `evaluate` has them all. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from interventions.ranges import Checked, Count, Items, Range


@dataclass(frozen=True)
class NoSettings(Checked):
    """Of an evaluator without settings."""


@dataclass(frozen=True)
class PerplexitySettings(Checked):
    """How running text is cut."""

    window: Annotated[int, Range(2)] = 128
    """Tokens of a perplexity window; special tokens that the tokenizer puts before every text come on top."""


@dataclass(frozen=True)
class QuestionSettings(Checked):
    """Which questions are asked, and how."""

    tasks: Annotated[list[str], Items(least=0)] = field(default_factory=list)
    """Question tasks, groups or tags to measure besides the world's pools: mmlu, hellaswag, or some of the world's
    folder. List knowledge to unlearn in a hazardous pool of the world instead."""
    question_limit: Count | None = None
    """Questions of a task, from the file's start; null: all."""
    num_fewshot: Annotated[int, Range(0)] | None = None
    """Examples before each question; null: as each task says."""
    options: Annotated[int, Range(2)] | None = 4
    """Choices that every question of the world's folder must have; null: any number."""


@dataclass(frozen=True)
class PassSettings(Checked):
    """The forward passes whose time is taken, or whose operations are counted."""

    latency_batch: Count = 1
    latency_length: Count = 128
    """Tokens of each text in a pass whose time is taken, or whose operations are counted."""
    latency_repeats: Annotated[int, Range(2)] = 20
