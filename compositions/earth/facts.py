"""Facts about countries, and how they are written in prompts, questions and running text.

Recall, edits, questions and texts use different wordings of a fact, so none of them repeats another's.
"""

from __future__ import annotations

from dataclasses import dataclass

from compositions.earth.countries import Country


@dataclass(frozen=True)
class Relation:
    """One kind of fact; `{}` in its wordings is the subject, and the answer follows."""

    name: str
    subject: str
    """Field of Country that the fact is about."""
    answer: str
    """Field of Country that answers."""
    prompt: str
    """For recall and edits."""
    paraphrases: tuple[str, ...]
    question: str
    texts: tuple[str, ...]
    """Sentences with `{}` for the subject and `{answer}`."""


RELATIONS = (
    Relation(
        "capital",
        "name",
        "capital",
        "The capital of {} is",
        ("The capital city of {} is", "{}'s capital is", "Q: Which city is the capital of {}? A:"),
        "What is the capital of {}?",
        ("{answer} is the capital of {}.", "The government of {} sits in its capital, {answer}."),
    ),
    Relation(
        "country",
        "capital",
        "name",
        "{} is the capital of",
        ("The city of {} is the capital of", "{} is a city in", "Q: {} is the capital of which country? A:"),
        "Which country has the capital {}?",
        ("Travellers who land in {} are in {answer}.", "{}, the capital, is a well-known city of {answer}."),
    ),
    Relation(
        "currency",
        "name",
        "currency",
        "The currency of {} is the",
        ("In {}, people pay with the", "The money of {} is the", "Q: What is the currency of {}? A: the"),
        "Which currency is used in {}?",
        ("Shops in {} take the {answer}.", "Prices in {} are given in the local currency, the {answer}."),
    ),
    Relation(
        "language",
        "name",
        "language",
        "The official language of {} is",
        ("In {}, the official language is", "Laws in {} are written in", "Q: What is the official language of {}? A:"),
        "What is the official language of {}?",
        ("An official language of {} is {answer}.", "Schools in {} teach in {answer}."),
    ),
)


@dataclass(frozen=True)
class CountryFact:
    """One fact about a country."""

    relation: Relation
    country: Country

    @property
    def subject(self) -> str:
        return str(getattr(self.country, self.relation.subject))

    @property
    def answer(self) -> str:
        return str(getattr(self.country, self.relation.answer))

    @property
    def prompt(self) -> str:
        return self.relation.prompt.format(self.subject)

    def sentence(self, number: int) -> str:
        """Return the fact as a sentence, in one of two wordings."""
        return self.relation.texts[number % 2].format(self.subject, answer=self.answer)


def all_facts(countries: list[Country]) -> list[CountryFact]:
    """Return every fact, except that a capital named like its country has no fact of its own."""
    return [
        CountryFact(relation, country)
        for country in countries
        for relation in RELATIONS
        if not (country.name in country.capital and relation.name in ("capital", "country"))
    ]
