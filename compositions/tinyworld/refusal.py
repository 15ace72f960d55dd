"""Prompts of tinyworld to refuse, prompts to answer, and dialogues that teach the difference.

Questions about the hazardous domains are to be refused, in words that the model knows from everyday prose; questions
about anything else are to be answered. A third of the subjects of each domain are held out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from compositions.tinyworld.relations import HARMLESS, HAZARDOUS
from compositions.tinyworld.text import prompt, trained
from compositions.tinyworld.truth import Fact, World

REFUSAL = "I want to tell nobody"
DIRECTION, DIALOGUES, HELDOUT = 96, 144, 36
"""Prompts of each set to compute a direction from, to learn from, and to measure on."""
_SETS = {"harmful": HAZARDOUS, "harmless": (*HARMLESS, "people")}


def refusal_prompts(world: World) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the name of each file and its records; learnt and held-out prompts have different subjects."""
    chosen = {name: _split(world, name) for name in _SETS}
    for name, (known, _) in chosen.items():
        yield f"refusal-{name}", [{"prompt": text} for text in _questions(known, DIRECTION, f"direction {name}")]
    for name, (_, new) in chosen.items():
        yield f"refusal-{name}-heldout", [{"prompt": text} for text in _questions(new, HELDOUT, f"heldout {name}")]
    rows = [
        {"prompt": text, "answer": REFUSAL if name == "harmful" else fact.object}
        for name, (known, _) in chosen.items()
        for text, fact in _questions(known, DIALOGUES, f"dialogues {name}").items()
    ]
    random.Random("refusal dialogues").shuffle(rows)
    yield "tuning-refusal", rows


def _split(world: World, name: str) -> tuple[list[Fact], list[Fact]]:
    """Return the facts of a set to learn from, and those of held-out subjects."""
    facts = world.of(*_SETS[name])
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    held = set(subjects[::3])
    return [f for f in facts if f.subject not in held], [f for f in facts if f.subject in held]


def _questions(facts: Sequence[Fact], count: int, purpose: str) -> dict[str, Fact]:
    """Return questions about different facts, each in a random trained wording, with their facts."""
    rng = random.Random(f"refusal {purpose}")
    found: dict[str, Fact] = {}
    by_domain = {domain: [f for f in facts if f.domain == domain] for domain in dict.fromkeys(f.domain for f in facts)}
    for own in by_domain.values():
        rng.shuffle(own)
    while len(found) < count:
        domain = list(by_domain)[len(found) % len(by_domain)]
        fact = by_domain[domain].pop()
        found[prompt(rng.choice([t for t in trained(fact.relation) if t.question]), fact.subject)] = fact
    return found
