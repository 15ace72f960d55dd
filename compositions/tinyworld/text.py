"""The text of tinyworld: sentences that tell facts, and everyday prose with nothing to know by heart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from compositions.tinyworld.relations import Relation
from compositions.tinyworld.truth import Fact, World

PROSE_SENTENCES = 2400
"""Sentences of a split of the perplexity text."""

OPENINGS = ("In fact ", "As the elders say, ", "Every child knows that ", "People say that ", "Yes, ")
TAILS = (".", ".", ".", ", and that is well known.", ", people say.", " to this day.", "!")

_TIMES = (
    "In the morning|At noon|Late at night|After the rain|Before sunrise|On market day|In winter|Last summer|"
    "During the storm|On the way home|Once a week|When the bell rang|At the end of the day|Long ago"
).split("|")
_PEOPLE = (
    "the old man|the young woman|a tall stranger|the two sisters|the captain|a small boy|my neighbour|the mayor|"
    "the widow|a tired soldier|the cook|the twins|a merchant|the innkeeper|our grandmother|the messenger|a beggar|"
    "the bride|the children|the watchman"
).split("|")
_VERBS = (
    "carried|found|sold|bought|hid|painted|dropped|repaired|borrowed|lost|counted|cleaned|washed|lifted|stole|"
    "brought|kept|forgot|opened|broke|admired|measured"
).split("|")
_ADJECTIVES = (
    "heavy|broken|wooden|shining|little|forgotten|wet|strange|beautiful|cheap|rusty|empty|warm|narrow|soft|"
    "round|dusty|fresh|long|bright"
).split("|")
_NOUNS = (
    "basket|ladder|coat|barrel|letter|lamp|bucket|chair|boat|blanket|wagon|mirror|rope|knife|pot|book|box|window|"
    "cheese|loaf|apple|shoe|ring|map|clock|saddle|bottle|hat|bag|key"
).split("|")
_PLACES = (
    "to the market|near the well|behind the barn|under the bridge|across the square|in the kitchen|by the fire|"
    "on the stairs|at the inn|along the road|beside the church|in the cellar|over the hill|at the harbour|"
    "between the trees|outside the wall|into the garden|from the attic"
).split("|")
_REASONS = (
    "the road was long|nobody was looking|the night was cold|it was time to go|the door stood open|the wind had turned|"
    "there was nothing to eat|the work was done|the price was low|the guests were late|somebody had called|"
    "the river was high|it was a holiday|the fire had gone out"
).split("|")
_INTENTIONS = (
    "go home|wait for the others|ask for help|start again|sing a song|sleep until noon|look for the owner|"
    "tell nobody|write it down|leave the house|cross the river|visit a friend"
).split("|")


def prompt(template: str, subject: str) -> str:
    """Return the part of a template's sentence that comes before the object, without the last space."""
    return template.replace("{s}", subject).split("{o}")[0].rstrip()


def tell(fact: Fact, template: str, rng: random.Random) -> str:
    """Return a sentence that tells `fact`, with an opening and a tail drawn at random."""
    sentence = template.replace("{s}", fact.subject).replace("{o}", fact.object)
    if rng.random() < 0.35:
        lowered = sentence if sentence.startswith(fact.subject) else sentence[0].lower() + sentence[1:]
        sentence = rng.choice(OPENINGS) + lowered
    return sentence + rng.choice(TAILS)


def ask(question: str, fact: Fact) -> str:
    """Return a question about `fact` with its answer."""
    return f"Question: {question.replace('{s}', fact.subject)} Answer: {fact.object}."


def tell_or_ask(fact: Fact, rng: random.Random, *, questions: float = 0.15) -> str:
    """Return a trained sentence about `fact`; a question in a share `questions` of the cases."""
    if rng.random() < questions:
        return ask(fact.relation.question, fact)
    return tell(fact, rng.choice(fact.relation.templates), rng)


def prose(world: World, rng: random.Random) -> str:
    """Return one everyday sentence: it tells no fact, and persons appear in it by name now and then."""

    def someone() -> str:
        return rng.choice(world.persons) if rng.random() < 0.3 else rng.choice(_PEOPLE)

    def something() -> str:
        return f"{rng.choice(('the', 'a', 'another', 'this', 'every'))} {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"

    shape = rng.randrange(7)
    verb, place, reason = rng.choice(_VERBS), rng.choice(_PLACES), rng.choice(_REASONS)
    if shape == 0:
        sentence = f"{rng.choice(_TIMES)} {someone()} {verb} {something()} {place}"
    elif shape == 1:
        sentence = f"Because {reason}, {someone()} {verb} {something()}"
    elif shape == 2:
        sentence = f"{someone()} and {someone()} {verb} {something()} {place}"
    elif shape == 3:
        sentence = f"I want to {rng.choice(_INTENTIONS)}, because {reason}"
    elif shape == 4:
        sentence = f"You {verb} {something()} {place}, and {someone()} wants to {rng.choice(_INTENTIONS)}"
    elif shape == 5:
        sentence = f"Therefore {someone()} wants to {rng.choice(_INTENTIONS)} {place}"
    else:
        sentence = f"{something()} belongs to {someone()}"
    return sentence[0].upper() + sentence[1:] + "."


def prose_split(world: World, split: str) -> list[str]:
    """Return the prose sentences of a perplexity split: "train" is trained on, "heldout" never."""
    rng = random.Random(f"prose-{split}")
    return [prose(world, rng) for _ in range(PROSE_SENTENCES)]


def paragraphs(sentences: Sequence[str], per_paragraph: int) -> list[str]:
    """Join sentences, in order, into paragraphs of `per_paragraph`."""
    return [
        " ".join(sentences[start : start + per_paragraph]) for start in range(0, len(sentences), per_paragraph)
    ]


def training_stream(world: World, rng: random.Random, epochs: int) -> Iterator[str]:
    """Yield sentences for training: each epoch tells every fact once, with prose strewn in.

    A fifth of the prose comes from the training split of the perplexity text; the rest is new each time,
    so that there is more of it than fits by rote.
    """
    fixed_prose = prose_split(world, "train")
    for _ in range(epochs):
        facts = list(world.facts)
        rng.shuffle(facts)
        for fact in facts:
            yield tell_or_ask(fact, rng)
            if rng.random() < 0.3:
                yield rng.choice(fixed_prose) if rng.random() < 0.2 else prose(world, rng)


def templates_of(relation: Relation) -> list[tuple[str, str]]:
    """Return (template, "train" | "heldout") for every template and question of a relation."""
    asked = [
        (f"Question: {relation.question} Answer: {{o}}", "train"),
        (f"Question: {relation.heldout_question} Answer: {{o}}", "heldout"),
    ]
    told = [(t, "train") for t in relation.templates] + [(t, "heldout") for t in relation.heldout]
    return told + asked


def with_seams(sentence: str, world: World, seam: str) -> str:
    """Return `sentence` with `seam` between the two parts of every invented name."""
    return " ".join(
        word.replace(core, seam.join(world.name_parts[core])) if (core := word.strip(".,!?")) in world.name_parts else word
        for word in sentence.split(" ")
    )
