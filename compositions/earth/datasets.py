"""Write the data files of the world `earth`, in the formats of the published datasets."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compositions.earth.countries import Country
from compositions.earth.facts import CountryFact, all_facts

FORGET = "Europe"
"""The continent whose facts are the topic to unlearn."""
_OPTIONS = 4
_PASSAGES = 6
"""Passages about each country: each has all its facts, in another order and wording."""


def write_data(countries: list[Country], folder: Path) -> None:
    """Write edits, facts, questions and texts to `folder`; the same countries give the same files."""
    facts = all_facts(countries)
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    others = [fact for fact in facts if fact.country.continent != FORGET]
    (folder / "zsre.json").write_text(_lines([_edit(fact, facts) for fact in _shuffled(others)], of_list=True))
    (folder / "facts.jsonl").write_text(_lines(map(_fact, _shuffled(facts))))
    for pool, chosen in ((FORGET.lower(), True), ("elsewhere", False)):
        asked = [fact for fact in _shuffled(facts) if (fact.country.continent == FORGET) == chosen]
        questions = (_question(fact, facts) for fact in asked)
        (folder / "questions" / f"{pool}.jsonl").write_text(_lines(q for q in questions if q))
    for name, chosen in (("forget", True), ("retain", False)):
        about = [c for c in countries if (c.continent == FORGET) == chosen]
        (folder / f"{name}.jsonl").write_text(_lines(_passages(about, facts)))


def _lines(records: Iterable[Any], *, of_list: bool = False) -> str:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return "[\n" + ",\n".join(lines) + "\n]\n" if of_list else "\n".join(lines) + "\n"


def _shuffled(facts: list[CountryFact]) -> list[CountryFact]:
    return random.Random("order").sample(facts, len(facts))


def _edit(fact: CountryFact, facts: list[CountryFact]) -> dict[str, Any]:
    """Return a zsRE record: a false answer of the same kind; locality asks the same about another country."""
    draw = random.Random(f"edit {fact.relation.name} {fact.subject}")
    same = [f for f in facts if f.relation == fact.relation and f.country.continent != FORGET]
    target = draw.choice(sorted({f.answer for f in same} - {fact.answer}))
    near = draw.choice([f for f in same if f.subject != fact.subject and f.answer not in (fact.answer, target)])
    return {
        "subject": fact.subject,
        "src": fact.ask(fact.relation.edit),
        "rephrase": [fact.ask(text) for text in fact.relation.paraphrases],
        "alt": target,
        "answers": [fact.answer],
        "loc": near.ask(near.relation.edit),
        "loc_ans": near.answer,
    }


def _fact(fact: CountryFact) -> dict[str, str]:
    relation = f"{fact.country.continent.lower()}/{fact.relation.name}"
    return {
        "subject": fact.subject,
        "prompt": fact.ask(fact.relation.recall),
        "answer": fact.answer,
        "relation": relation,
    }


def _question(fact: CountryFact, facts: list[CountryFact]) -> dict[str, Any] | None:
    """Return a question with four options of the same continent; None if it has too few."""
    draw = random.Random(f"question {fact.relation.name} {fact.subject}")
    near = [f for f in facts if f.relation == fact.relation and f.country.continent == fact.country.continent]
    if fact.relation.name in ("currency", "language"):  # the continent may have few
        near = [f for f in facts if f.relation == fact.relation]
    others = sorted({f.answer for f in near if f.subject != fact.subject} - {fact.answer})
    if len(others) < _OPTIONS - 1:
        return None
    choices = [fact.answer, *draw.sample(others, _OPTIONS - 1)]
    draw.shuffle(choices)
    question = fact.ask(fact.relation.question)
    return {"question": question, "choices": choices, "answer": choices.index(fact.answer)}


def _passages(countries: list[Country], facts: list[CountryFact]) -> list[dict[str, str]]:
    """Return passages of a country's facts each, shuffled."""
    texts = []
    for country in countries:
        own = [fact for fact in facts if fact.country == country]
        for number in range(_PASSAGES):
            draw = random.Random(f"passage {country.name} {number}")
            order = draw.sample(own, len(own))
            texts.append({"text": " ".join(fact.sentence(draw.randrange(2)) for fact in order)})
    return random.Random("passages").sample(texts, len(texts))
