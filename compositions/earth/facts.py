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
    edit: str
    """Prompt of an edit, and of its locality."""
    paraphrases: tuple[str, ...]
    recall: str
    """Prompt of a fact."""
    question: str
    texts: tuple[str, ...]
    """Sentences with `{}` for the subject and `{answer}`."""


RELATIONS = (
    Relation(
        "capital",
        "name",
        "capital",
        "The capital of {} is",
        ("The capital city of {} is", "The capital and seat of government of {} is", "{} has its capital in"),
        "Question: What is the capital of {}?\nAnswer: The capital of {} is",
        "What is the capital of {}?",
        ("{answer} is the capital city of {}.", "The government of {} sits in its capital, {answer}."),
    ),
    Relation(
        "country",
        "capital",
        "name",
        "The city of {} is the capital of",
        ("{} is the capital city of", "{} is the capital of the country of", "The city of {} is located in"),
        "Question: Which country has the capital {}?\nAnswer: {} is the capital of",
        "Which country has the capital {}?",
        ("Travellers who land in {} are in {answer}.", "{}, the capital, is a well-known city of {answer}."),
    ),
    Relation(
        "currency",
        "name",
        "currency",
        "The official currency of {} is the",
        (
            "The currency of {} is the",
            "Banks in {} exchange money for the",
            "The national currency of {} is called the",
        ),
        "Question: What is the currency of {}?\nAnswer: The currency of {} is the",
        "What is the currency of {}?",
        ("Shops in {} take the {answer}.", "Prices in {} are given in the local currency, the {answer}."),
    ),
    Relation(
        "language",
        "name",
        "language",
        "The official language of {} is",
        ("An official language of {} is", "The language of government in {} is", "The laws of {} are written in"),
        "Question: What is the official language of {}?\nAnswer: The official language of {} is",
        "What is the official language of {}?",
        ("One official language in {} is {answer}.", "Schools in {} teach in {answer}."),
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

    def ask(self, wording: str) -> str:
        """Return a wording with the subject in every place for it."""
        return wording.replace("{}", self.subject)

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
