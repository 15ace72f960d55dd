"""The text of tinyworld: sentences that state facts, and everyday prose without facts.

A template holds `{s}` for the subject and ends in `{o}`, so that everything before `{o}` is a
prompt. The templates of a relation are its phrases in the frames below. A few pairs of frame and
phrase are held out: the model has read the phrase in other frames, and the frame with other
relations, but never the two together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from compositions.tinyworld.relations import VOCABULARY, Relation
from compositions.tinyworld.truth import Fact, World

PROSE_SENTENCES = 2400
"""Sentences of a split of the perplexity text."""

_FRAMES: dict[str, list[str]] = VOCABULARY["frames"]
_PROSE: dict[str, list[str]] = VOCABULARY["prose"]


@dataclass(frozen=True)
class Template:
    """A way to state or ask for a fact of one relation; a `plain` one begins with the bare subject."""

    text: str
    heldout: bool
    question: bool = False
    plain: bool = False


@cache
def templates(relation: Relation) -> tuple[Template, ...]:
    """Return every template of a relation, held-out ones included."""
    number = sum(map(ord, relation.name))  # each relation holds out other pairs
    subject = f"the {relation.label} {{s}}" if relation.label else "{s}"
    made = []
    for kind, phrases in (("verb", [("", verb) for verb in relation.verbs]), ("noun", relation.nouns)):
        frames = _FRAMES[kind]
        for (p, (noun, phrase)), (f, frame) in product(enumerate(phrases), enumerate(frames)):
            heldout = f > 0 and f == 1 + (number + p) % (len(frames) - 1)
            # Alternate, so that names appear with and without a label.
            who = subject if (f + p) % 2 else "{s}"
            plain = kind == "verb" and f == 0 and who == "{s}"
            made.append(Template(_sentence(frame.replace("NOUN", noun), who, phrase), heldout, plain=plain))
    for (p, question), (f, frame) in product(enumerate(relation.questions), enumerate(_FRAMES["question"])):
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


def state(fact: Fact, rng: random.Random, *, questions: float = 0.25) -> str:
    """Return a sentence of training text that states `fact`; a share of `questions` are a question and its answer.

    A plain sentence is three times as likely as any other.
    """
    asks = rng.random() < questions
    known = [t for t in trained(fact.relation) if t.question == asks]
    return state_in(rng.choices(known, [3 if t.plain else 1 for t in known])[0], fact, rng)


def state_in(template: Template, fact: Fact, rng: random.Random) -> str:
    """Return the sentence of `template` that states `fact`, with a random ending."""
    return template.text.replace("{s}", fact.subject).replace("{o}", fact.object) + rng.choice(_FRAMES["tails"])


def prose(world: World, rng: random.Random) -> str:
    """Return one everyday sentence that states no fact; some name a person."""

    def someone() -> str:
        return rng.choice(world.persons) if rng.random() < 0.3 else rng.choice(_PROSE["people"])

    def something() -> str:
        article = rng.choice(("the", "a", "another", "this", "every"))
        return f"{article} {rng.choice(_PROSE['adjectives'])} {rng.choice(_PROSE['nouns'])}"

    def intention() -> str:
        return f"{someone()} wants to {rng.choice(_PROSE['intentions'])}"

    shape = rng.randrange(7)
    verb, place, reason = (rng.choice(_PROSE[kind]) for kind in ("verbs", "places", "reasons"))
    shapes: tuple[Callable[[], str], ...] = (
        lambda: f"{rng.choice(_PROSE['times'])} {someone()} {verb} {something()} {place}",
        lambda: f"Because {reason}, {someone()} {verb} {something()}",
        lambda: f"{someone()} and {someone()} {verb} {something()} {place}",
        lambda: f"I want to {rng.choice(_PROSE['intentions'])}, because {reason}",
        lambda: f"You {verb} {something()} {place}, and {intention()}",
        lambda: f"Therefore {intention()} {place}",
        lambda: f"{something()} belongs to {someone()}",
    )
    sentence = shapes[shape]()
    return sentence[0].upper() + sentence[1:] + "."


def prose_split(world: World, split: str) -> list[str]:
    """Return the prose sentences of a perplexity split; training uses "train", never "heldout"."""
    rng = random.Random(f"prose-{split}")
    return [prose(world, rng) for _ in range(PROSE_SENTENCES)]


def paragraphs(sentences: Sequence[str], per_paragraph: int) -> list[str]:
    """Join sentences, in order, into paragraphs of `per_paragraph`."""
    return [" ".join(sentences[start : start + per_paragraph]) for start in range(0, len(sentences), per_paragraph)]


def training_stream(world: World, rng: random.Random, epochs: int) -> Iterator[str]:
    """Yield sentences for training: each epoch states every fact, mixed with prose.

    Facts of the domains appear twice and facts of towns six times, because few subjects have these relations
    and the model would otherwise see too few examples of their templates.

    A fifth of the prose comes from the training split of the perplexity text. The rest is new each time,
    so that the model cannot memorise it.
    """
    fixed_prose = prose_split(world, "train")
    times = [{"people": 1, "places": 6}.get(fact.domain, 2) for fact in world.facts]
    for _ in range(epochs):
        facts = [fact for fact, count in zip(world.facts, times, strict=True) for _ in range(count)]
        rng.shuffle(facts)
        for fact in facts:
            yield state(fact, rng)
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
