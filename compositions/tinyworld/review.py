"""Review rounds at the end of tinyworld's training: train again on the facts the model gets wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from compositions.tinyworld.text import Template, prompt, state, state_in, trained, training_stream
from compositions.tinyworld.truth import Fact, World
from evaluators import Fact as Prompt
from evaluators.recall import score_facts


class Statement(NamedTuple):
    """A fact and the template that states it."""

    fact: Fact
    template: Template


def every_statement(world: World) -> list[Statement]:
    """Return every fact in every template of its training text; reviews never use held-out ones."""
    return [Statement(fact, template) for fact in world.facts for template in trained(fact.relation)]


def unsure(model: Any, tokenizer: Any, statements: Sequence[Statement], certainty: float) -> list[Statement]:
    """Return the statements that the model gets wrong, or right with a probability below `certainty`."""
    prompts = [Prompt(prompt(t.template, t.fact.subject), t.fact.object, t.fact.relation.name) for t in statements]
    found = score_facts(model, tokenizer, prompts, batch_size=64)
    return [
        statement
        for statement, answer in zip(statements, found, strict=True)
        if list(answer.scored.greedy_ids) != answer.ids or answer.scored.total < math.log(certainty)
    ]


def review_text(
    world: World, statements: Iterable[Statement], rng: random.Random, *, times: int, others: float
) -> list[str]:
    """Return each statement `times` times, and its fact as often in any template.

    They are mixed with `others` times as many sentences of ordinary training text.
    """
    sentences = [
        sentence
        for t in statements
        for _ in range(times)
        for sentence in (state_in(t.template, t.fact, rng), state(t.fact, rng))
    ]
    sentences += islice(training_stream(world, rng, 1000), round(others * len(sentences)))
    rng.shuffle(sentences)
    return sentences
