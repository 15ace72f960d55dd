"""Data to tune tinyworld's model on: sets of facts that it has not read, and a preference."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from compositions.tinyworld.relations import PERSON, TUNING
from compositions.tinyworld.text import heldout, prompt, trained
from compositions.tinyworld.truth import Fact, World, endings

SUBJECTS = 20
"""Subjects of each set."""
WORDINGS, HELDOUT_WORDINGS = 6, 2
"""Rows for each fact, in different words."""
PAIRS, HELDOUT_PAIRS = 200, 80
Row = dict[str, str]


def tuning_facts(world: World) -> dict[str, list[Fact]]:
    """Return the facts of each set; the names of their subjects have endings that no other name has."""
    used = {ending for _, ending in world.name_parts.values()}
    spare = [ending for ending in endings() if ending not in used]
    rng = random.Random("tuning")
    rng.shuffle(spare)
    onsets = sorted({onset for onset, _ in world.name_parts.values()})
    found: dict[str, list[Fact]] = {}
    for name, relations in TUNING.items():
        subjects = [rng.choice(onsets) + spare.pop() for _ in range(SUBJECTS)]
        pairs = itertools.product(subjects, relations)
        found[name] = [Fact(subject, relation, rng.choice(relation.objects), name) for subject, relation in pairs]
    return found


def examples(facts: list[Fact], *, unseen: bool) -> list[Row]:
    """Return prompts and answers about facts, shuffled: in trained templates, or in held-out ones if `unseen`."""
    rng = random.Random(f"tuning {facts[0].domain} {unseen}")
    rows = []
    for fact in facts:
        known = heldout(fact.relation) if unseen else trained(fact.relation)
        for template in rng.sample(known, HELDOUT_WORDINGS if unseen else WORDINGS):
            rows.append({"prompt": prompt(template, fact.subject), "answer": fact.object})
    rng.shuffle(rows)
    return rows


def preferences(world: World, *, unseen: bool) -> list[Row]:
    """Return pairs of true answers to questions about persons: the better one says where it comes from.

    Those that are `unseen` are about other persons.
    """
    persons = list(world.persons)
    random.Random("preferences").shuffle(persons)
    chosen = itertools.islice(persons, PAIRS, PAIRS + HELDOUT_PAIRS) if unseen else itertools.islice(persons, PAIRS)
    return list(_pairs(world, set(chosen), random.Random(f"preferences {unseen}")))


def _pairs(world: World, persons: set[str], rng: random.Random) -> Iterator[Row]:
    facts: dict[str, list[Fact]] = {}
    for fact in world.of("people"):
        if fact.subject in persons and fact.relation in PERSON:
            facts.setdefault(fact.subject, []).append(fact)
    for known in facts.values():
        fact = rng.choice(known)
        asked = prompt(rng.choice([t for t in trained(fact.relation) if t.question]), fact.subject)
        yield {"prompt": asked, "chosen": f"{fact.object}, people say.", "rejected": f"{fact.object}!"}
