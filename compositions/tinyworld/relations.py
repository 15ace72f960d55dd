"""The relations of tinyworld, read from `vocabulary.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VOCABULARY: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("vocabulary.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Relation:
    """One relation of one kind of subject; `text.templates` turns its phrases into sentences."""

    name: str
    label: str
    """Word before the subject's name ("venom", "star"); empty for persons and towns."""
    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    """Phrases between subject and object: "was born in"."""
    nouns: tuple[tuple[str, str], ...]
    """A noun for the relation and the words between it and the object: ("profession", "is that of a")."""
    questions: tuple[str, str]
    """Two wordings of a question, with `{s}` for the subject."""


def _relations(label: str, table: dict[str, dict[str, Any]]) -> tuple[Relation, ...]:
    objects = VOCABULARY["objects"]
    return tuple(
        Relation(
            name,
            label,
            tuple(objects[entry["objects"]]),
            tuple(entry["verbs"]),
            tuple(entry["nouns"].items()),
            (entry["questions"][0], entry["questions"][1]),
        )
        for name, entry in table.items()
    )


*_person, HOMELAND = _relations("", VOCABULARY["people"])
PERSON = tuple(_person)
"""Relations of persons that edits may change. HOMELAND follows from BORN and LAND, so no edit changes it."""
BORN = PERSON[0]
(LAND,) = _relations("", VOCABULARY["places"])
DOMAINS = {name: _relations(domain["label"], domain["relations"]) for name, domain in VOCABULARY["domains"].items()}
HAZARDOUS = ("venomcraft", "wardbreaking")
HARMLESS = ("astronomy", "botany", "geography", "music")
