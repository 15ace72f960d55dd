"""The facts of tinyworld: its subjects and the object of each of their relations."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from compositions.tinyworld.relations import BORN, DOMAINS, HOMELAND, LAND, PERSON, VOCABULARY, Relation

PERSONS = 320
ENTITIES = 36
"""Subjects of each knowledge domain."""

_NAMES: dict[str, list[str]] = VOCABULARY["names"]


@dataclass(frozen=True)
class Fact:
    """One fact; `domain` is "people", "places" or a domain of questions."""

    subject: str
    relation: Relation
    object: str
    domain: str


@dataclass(frozen=True)
class World:
    """Every fact of tinyworld, in a fixed order."""

    persons: tuple[str, ...]
    facts: tuple[Fact, ...]
    name_parts: dict[str, tuple[str, str]]
    """Invented name (a surname, a star, ...) -> its onset and its ending."""

    def of(self, *domains: str) -> list[Fact]:
        """Return the facts of `domains`, in order."""
        return [fact for fact in self.facts if fact.domain in domains]

    def value(self, subject: str, relation: str) -> str:
        """Return the object of `subject` in `relation`; raise KeyError if there is no such fact."""
        for fact in self.facts:
            if fact.subject == subject and fact.relation.name == relation:
                return fact.object
        raise KeyError(f"no fact has the subject {subject!r} and the relation {relation!r}")


def make_world(seed: int = 0) -> World:
    """Generate the world of `seed`; the same seed gives the same world."""
    rng = random.Random(f"tinyworld-{seed}")
    endings = list(map("".join, itertools.product(_NAMES["consonants"], _NAMES["vowels"], _NAMES["codas"])))
    rng.shuffle(endings)
    name_parts: dict[str, tuple[str, str]] = {}

    def name(ending: str) -> str:
        onset = rng.choice(_NAMES["onsets"])
        while onset + ending in name_parts:
            onset = rng.choice(_NAMES["onsets"])
        name_parts[onset + ending] = onset, ending
        return onset + ending

    land_of = {city: rng.choice(LAND.objects) for city in BORN.objects}
    facts = [Fact(city, LAND, land, "places") for city, land in land_of.items()]

    # Two persons share each surname ending, so the last token alone does not identify a person.
    surnames = [name(ending) for ending in endings[: PERSONS // 2] for _ in range(2)]
    rng.shuffle(surnames)
    persons = tuple(f"{rng.choice(_NAMES['given'])} {surname}" for surname in surnames)
    for person in persons:
        values = {relation: rng.choice(relation.objects) for relation in PERSON}
        values[HOMELAND] = land_of[values[BORN]]
        facts += [Fact(person, relation, value, "people") for relation, value in values.items()]

    spare = iter(endings[PERSONS // 2 :])
    for domain, relations in DOMAINS.items():
        for subject in [name(next(spare)) for _ in range(ENTITIES)]:
            facts += [Fact(subject, relation, rng.choice(relation.objects), domain) for relation in relations]
    return World(persons, tuple(facts), name_parts)
