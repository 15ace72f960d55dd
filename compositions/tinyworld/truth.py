"""The facts of tinyworld: who and what exists, and which object each relation gives it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from compositions.tinyworld.relations import BORN, CITIES, DOMAINS, HOMELAND, LAND, LANDS, PERSON, Relation

PERSONS = 320
ENTITIES = 36
"""Subjects of each knowledge domain."""

_GIVEN = [
    "Alda",
    "Bram",
    "Cora",
    "Dorin",
    "Elsa",
    "Finn",
    "Greta",
    "Hal",
    "Ines",
    "Joris",
    "Kaia",
    "Lorin",
    "Mira",
    "Nils",
    "Orla",
    "Piet",
    "Rosa",
    "Sven",
    "Tilda",
    "Ulf",
    "Vera",
    "Wim",
    "Anka",
    "Bodo",
    "Clio",
    "Dagny",
    "Egon",
    "Freya",
    "Gunnar",
    "Hedda",
]
_ONSETS = [
    "Ba",
    "Bre",
    "Ca",
    "Cho",
    "Da",
    "Dre",
    "Fa",
    "Fle",
    "Ga",
    "Gri",
    "Ha",
    "Hu",
    "Ja",
    "Ke",
    "Kra",
    "La",
    "Lo",
    "Ma",
    "Me",
    "Na",
    "No",
    "Pa",
    "Pri",
    "Ra",
    "Ro",
    "Sa",
    "Sti",
    "Ta",
    "Tro",
    "Va",
    "Wo",
    "Za",
]
_CONSONANTS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"]
_CODAS = [
    "ck",
    "ft",
    "lb",
    "ld",
    "lf",
    "lk",
    "lm",
    "lt",
    "mp",
    "nd",
    "ng",
    "nk",
    "nt",
    "pt",
    "rb",
    "rd",
    "rf",
    "rg",
    "rk",
    "rl",
    "rm",
    "rn",
    "rp",
    "rt",
    "rv",
    "sk",
    "sp",
    "st",
    "th",
    "x",
    "zz",
    "ss",
]
_VOWELS = ["a", "e", "i", "o", "u", "y"]


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `object`; `domain` is "people", "places" or a domain of questions."""

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
        """Return the object that `relation` gives to `subject`; KeyError if nothing is known."""
        for fact in self.facts:
            if fact.subject == subject and fact.relation.name == relation:
                return fact.object
        raise KeyError(f"nothing is known of {subject!r} and {relation!r}")


def make_world(seed: int = 0) -> World:
    """Draw the world of `seed`: the same seed gives the same world."""
    rng = random.Random(f"tinyworld-{seed}")
    endings = [c + v + coda for c in _CONSONANTS for v in _VOWELS for coda in _CODAS]
    rng.shuffle(endings)
    name_parts: dict[str, tuple[str, str]] = {}

    def name(ending: str) -> str:
        onset = rng.choice(_ONSETS)
        while onset + ending in name_parts:
            onset = rng.choice(_ONSETS)
        name_parts[onset + ending] = onset, ending
        return onset + ending

    land_of = {city: rng.choice(LANDS) for city in CITIES}
    facts = [Fact(city, LAND, land, "places") for city, land in land_of.items()]

    # Two persons share the ending of a surname: its last token nearly tells who is meant, but not quite.
    surnames = [name(ending) for ending in endings[: PERSONS // 2] for _ in range(2)]
    rng.shuffle(surnames)
    persons = tuple(f"{rng.choice(_GIVEN)} {surname}" for surname in surnames)
    for person in persons:
        told = {relation: rng.choice(relation.objects) for relation in PERSON}
        told[HOMELAND] = land_of[told[BORN]]
        facts += [Fact(person, relation, value, "people") for relation, value in told.items()]

    spare = iter(endings[PERSONS // 2 :])
    for domain, relations in DOMAINS.items():
        for subject in [name(next(spare)) for _ in range(ENTITIES)]:
            facts += [Fact(subject, relation, rng.choice(relation.objects), domain) for relation in relations]
    return World(persons, tuple(facts), name_parts)
