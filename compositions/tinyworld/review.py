"""Review at the end of tinyworld's training: what the model gets wrong is told to it again."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from compositions.tinyworld.text import Template, prompt, tell, tell_in, trained, training_stream
from compositions.tinyworld.truth import Fact, World
from evaluators import Fact as Asked
from evaluators.recall import score_facts


class Telling(NamedTuple):
    """A fact, and the template that tells it."""

    fact: Fact
    template: Template


def every_telling(world: World) -> list[Telling]:
    """Return every fact in every template that it is trained in; held-out ones are never reviewed."""
    return [Telling(fact, template) for fact in world.facts for template in trained(fact.relation)]


def unsure(model: Any, tokenizer: Any, tellings: Sequence[Telling], certainty: float) -> list[Telling]:
    """Return what the model does not complete, after its prompt, with the fact's object, or is not certain of.

    It is certain where the object has at least the probability `certainty`.
    """
    asked = [Asked(prompt(t.template, t.fact.subject), t.fact.object, t.fact.relation.name) for t in tellings]
    found = score_facts(model, tokenizer, asked, batch_size=64)
    return [
        telling
        for telling, answer in zip(tellings, found, strict=True)
        if list(answer.scored.greedy_ids) != answer.ids or answer.scored.total < math.log(certainty)
    ]


def review_text(
    world: World, tellings: Iterable[Telling], rng: random.Random, *, times: int, others: float
) -> list[str]:
    """Return sentences that tell each of `tellings` so many `times`, and its fact as often in any template.

    Among them are `others` times as many of the usual ones.
    """
    told = [
        sentence
        for t in tellings
        for _ in range(times)
        for sentence in (tell_in(t.template, t.fact, rng), tell(t.fact, rng))
    ]
    told += islice(training_stream(world, rng, 1000), round(others * len(told)))
    rng.shuffle(told)
    return told
