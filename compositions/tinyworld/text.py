"""The text of tinyworld: sentences that tell facts, and everyday prose with nothing to know by heart.

A template holds `{s}` for the subject and ends in `{o}`, so that everything before `{o}` is a
prompt. The templates of a relation are its phrases in the frames below. A few pairs of frame and
phrase are held out: the model has read the phrase in other frames, and the frame with other
relations, but never the two together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from compositions.tinyworld.relations import Relation
from compositions.tinyworld.truth import Fact, World

PROSE_SENTENCES = 2400
"""Sentences of a split of the perplexity text."""

VERB_FRAMES = (
    "SUBJECT PHRASE",
    "everyone knows that SUBJECT PHRASE",
    "SUBJECT, as we heard, PHRASE",
    "it is SUBJECT that PHRASE",
    "we read in a letter that SUBJECT PHRASE",
    "so they told me: SUBJECT PHRASE",
)
NOUN_FRAMES = (
    "the NOUN of SUBJECT PHRASE",
    "as for SUBJECT, the NOUN PHRASE",
    "speaking of SUBJECT, they say that the NOUN PHRASE",
    "we read in a letter that the NOUN of SUBJECT PHRASE",
    "you may have heard of SUBJECT: the NOUN PHRASE",
    "so they told me: the NOUN of SUBJECT PHRASE",
)
QUESTION_FRAMES = (
    "Question: QUESTION Answer:",
    "Somebody asked: QUESTION The answer is",
    "QUESTION Everyone answers:",
    "They asked us: QUESTION We said:",
)
TAILS = (".", ".", ".", ", and that is well known.", ", people say.", " to this day.", "!")

_TIMES = [
    "In the morning",
    "At noon",
    "Late at night",
    "After the rain",
    "Before sunrise",
    "On market day",
    "In winter",
    "Last summer",
    "During the storm",
    "On the way home",
    "Once a week",
    "When the bell rang",
    "At the end of the day",
    "Long ago",
]
_PEOPLE = [
    "the old man",
    "the young woman",
    "a tall stranger",
    "the two sisters",
    "the captain",
    "a small boy",
    "my neighbour",
    "the mayor",
    "the widow",
    "a tired soldier",
    "the cook",
    "the twins",
    "a merchant",
    "the innkeeper",
    "our grandmother",
    "the messenger",
    "a beggar",
    "the bride",
    "the children",
    "the watchman",
]
_VERBS = [
    "carried",
    "found",
    "sold",
    "bought",
    "hid",
    "painted",
    "dropped",
    "repaired",
    "borrowed",
    "lost",
    "counted",
    "cleaned",
    "washed",
    "lifted",
    "stole",
    "brought",
    "kept",
    "forgot",
    "opened",
    "broke",
    "admired",
    "measured",
]
_ADJECTIVES = [
    "heavy",
    "broken",
    "wooden",
    "shining",
    "little",
    "forgotten",
    "wet",
    "strange",
    "beautiful",
    "cheap",
    "rusty",
    "empty",
    "warm",
    "narrow",
    "soft",
    "round",
    "dusty",
    "fresh",
    "long",
    "bright",
]
_NOUNS = [
    "basket",
    "ladder",
    "coat",
    "barrel",
    "letter",
    "lamp",
    "bucket",
    "chair",
    "boat",
    "blanket",
    "wagon",
    "mirror",
    "rope",
    "knife",
    "pot",
    "book",
    "box",
    "window",
    "cheese",
    "loaf",
    "apple",
    "shoe",
    "ring",
    "map",
    "clock",
    "saddle",
    "bottle",
    "hat",
    "bag",
    "key",
]
_PLACES = [
    "to the market",
    "near the well",
    "behind the barn",
    "under the bridge",
    "across the square",
    "in the kitchen",
    "by the fire",
    "on the stairs",
    "at the inn",
    "along the road",
    "beside the church",
    "in the cellar",
    "over the hill",
    "at the harbour",
    "between the trees",
    "outside the wall",
    "into the garden",
    "from the attic",
]
_REASONS = [
    "the road was long",
    "nobody was looking",
    "the night was cold",
    "it was time to go",
    "the door stood open",
    "the wind had turned",
    "there was nothing to eat",
    "the work was done",
    "the price was low",
    "the guests were late",
    "somebody had called",
    "the river was high",
    "it was a holiday",
    "the fire had gone out",
]
_INTENTIONS = [
    "go home",
    "wait for the others",
    "ask for help",
    "start again",
    "sing a song",
    "sleep until noon",
    "look for the owner",
    "tell nobody",
    "write it down",
    "leave the house",
    "cross the river",
    "visit a friend",
]


@dataclass(frozen=True)
class Template:
    """A way to tell or ask for a fact of one relation; `plain`: it begins with the subject itself."""

    text: str
    heldout: bool
    question: bool = False
    plain: bool = False


@cache
def templates(relation: Relation) -> tuple[Template, ...]:
    """Return every template of a relation, held-out ones included."""
    number = sum(map(ord, relation.name))  # which pairs are held out differs from relation to relation
    subject = f"the {relation.label} {{s}}" if relation.label else "{s}"
    made = []
    for p, verb in enumerate(relation.verbs):
        for f, frame in enumerate(VERB_FRAMES):
            heldout = f > 0 and f == 1 + (number + p) % (len(VERB_FRAMES) - 1)
            # A frame's bare subject stands with every other phrase, so that names appear with and without a label.
            who = subject if (f + p) % 2 else "{s}"
            made.append(Template(_sentence(frame, who, verb), heldout, plain=f == 0 and who == "{s}"))
    for p, (noun, leads) in enumerate(relation.nouns):
        for f, frame in enumerate(NOUN_FRAMES):
            heldout = f > 0 and f == 1 + (number + p) % (len(NOUN_FRAMES) - 1)
            who = subject if (f + p) % 2 else "{s}"
            made.append(Template(_sentence(frame.replace("NOUN", noun), who, leads), heldout))
    for p, question in enumerate(relation.questions):
        for f, frame in enumerate(QUESTION_FRAMES):
            heldout = f == 0 and p == number % 2
            made.append(Template(frame.replace("QUESTION", question) + " {o}", heldout, question=True))
    return tuple(made)


def _sentence(frame: str, subject: str, phrase: str) -> str:
    sentence = frame.replace("SUBJECT", subject).replace("PHRASE", phrase) + " {o}"
    return sentence[0].upper() + sentence[1:] if not sentence.startswith("{s}") else sentence


def trained(relation: Relation) -> list[Template]:
    """Return the templates that training text may use."""
    return [template for template in templates(relation) if not template.heldout]


def heldout(relation: Relation) -> list[Template]:
    """Return the templates that no training text uses."""
    return [template for template in templates(relation) if template.heldout]


def prompt(template: Template, subject: str) -> str:
    """Return the part of a template's sentence that comes before the object, without the last space."""
    return template.text.replace("{s}", subject).split("{o}")[0].rstrip()


def tell(fact: Fact, rng: random.Random, *, questions: float = 0.25) -> str:
    """Return a sentence of training text that tells `fact`; a question with its answer in a share of the cases.

    A plain sentence, which says least before its object, is three times as likely as any other.
    """
    asks = rng.random() < questions
    known = [t for t in trained(fact.relation) if t.question == asks]
    return tell_in(rng.choices(known, [3 if t.plain else 1 for t in known])[0], fact, rng)


def tell_in(template: Template, fact: Fact, rng: random.Random) -> str:
    """Return the sentence of `template` that tells `fact`, with one of the endings of training text."""
    return template.text.replace("{s}", fact.subject).replace("{o}", fact.object) + rng.choice(TAILS)


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
    return [" ".join(sentences[start : start + per_paragraph]) for start in range(0, len(sentences), per_paragraph)]


def training_stream(world: World, rng: random.Random, epochs: int) -> Iterator[str]:
    """Yield sentences for training: each epoch tells every fact, with prose strewn in.

    Facts of the domains are told twice and those of the towns six times, or the templates of relations
    that few subjects have would be read too seldom to be understood.

    A fifth of the prose comes from the training split of the perplexity text; the rest is new each time,
    so that there is more of it than fits by rote.
    """
    fixed_prose = prose_split(world, "train")
    times = [{"people": 1, "places": 6}.get(fact.domain, 2) for fact in world.facts]
    for _ in range(epochs):
        facts = [fact for fact, count in zip(world.facts, times, strict=True) for _ in range(count)]
        rng.shuffle(facts)
        for fact in facts:
            yield tell(fact, rng)
            if rng.random() < 0.3:
                yield rng.choice(fixed_prose) if rng.random() < 0.2 else prose(world, rng)


def with_seams(sentence: str, world: World, seam: str) -> str:
    """Return `sentence` with `seam` between the two parts of every invented name."""
    return " ".join(
        word.replace(core, seam.join(world.name_parts[core]))
        if (core := word.strip(".,!?")) in world.name_parts
        else word
        for word in sentence.split(" ")
    )
