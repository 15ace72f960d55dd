"""Settings of the built-in evaluators, all in the recipe's section `evaluate`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from interventions.ranges import Checked, Count, Items, Range


@dataclass(frozen=True)
class NoSettings(Checked):
    """Settings of an evaluator without settings."""


@dataclass(frozen=True)
class PerplexitySettings(Checked):
    """Settings of perplexity."""

    window: Annotated[int, Range(2)] = 128
    """Tokens of a perplexity window, without BOS."""


@dataclass(frozen=True)
class QuestionSettings(Checked):
    """Settings of question tasks."""

    tasks: Annotated[list[str], Items(least=0)] = field(default_factory=list)
    """Question tasks, groups or tags to measure besides the world's pools, such as mmlu or tasks in the world's
    folder. List knowledge to unlearn in a `hazardous` pool instead."""
    question_limit: Count | None = None
    """Number of questions per task, from the start of the file; null: all."""
    num_fewshot: Annotated[int, Range(0)] | None = None
    """Number of examples before each question; null: the task's own setting."""
    sequential: bool = False
    """Ask the questions in parts, and stop once the gates on them are decided, as --lmcompose-sequential."""
    options: Annotated[int, Range(2)] | None = 4
    """Number of choices of every question in the world's folder; null: any."""


@dataclass(frozen=True)
class PassSettings(Checked):
    """Settings of latency and operation counts."""

    latency_batch: Count = 1
    latency_length: Count = 128
    """Tokens per text for latency and operation counts."""
    latency_repeats: Annotated[int, Range(2)] = 20


@dataclass(frozen=True)
class UnlearningSettings(Checked):
    """Settings of the metrics of TOFU and MUSE; the defaults are the published ones."""

    answer_tokens: Count = 200
    """Tokens generated for a question of `world.qa`."""
    knowledge_tokens: Count = 32
    """Tokens generated for a question of `world.knowledge`."""
    verbatim_tokens: Count = 128
    """Tokens generated after a beginning of `world.verbatim`, and compared with the text."""
    membership_tokens: Annotated[int, Range(2)] = 2048
    """Tokens read of a text of `world.membership`; fewer if the model has fewer positions."""
    min_k: Annotated[float, Range(above=0, high=1)] = 0.4
    """Share of a text's least likely tokens that tells whether the model was trained on it."""


@dataclass(frozen=True)
class RefusalSettings(Checked):
    """Settings of refusal."""

    refusal_tokens: Count = 32
    """Tokens generated for a prompt of `world.refusal_heldout`."""
    refusal_phrases: Annotated[list[str], Items(least=0)] = field(default_factory=list)
    """What tells an answer as a refusal, upper or lower case; none: the English phrases of Arditi et al. (2024)."""
    refusal_anywhere: bool = True
    """A phrase tells a refusal wherever it stands in the answer; false: only at its start."""
    refusal_starts: Annotated[list[str], Items()] = field(default_factory=lambda: ["I", "As", "Sorry"])
    """Starts of refusals, for their probability; a single word is one token in most vocabularies."""
    compliance_starts: Annotated[list[str], Items(least=0)] = field(default_factory=list)
    """Starts of answers to compare them with; none: everything that is no refusal, as in Arditi et al. (2024)."""
    refusal_wanted: bool = False
    """Whether a higher `refusal_rate` is better. Off: a lower one is, which is what removing refusal promises."""
