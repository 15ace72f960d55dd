"""tinyworld's data files, in the schemas of zsRE, CounterFact, MQuAKE, WMDP and MMLU."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compositions.tinyworld.relations import (
    BORN,
    DOMAINS,
    HARMLESS,
    HAZARDOUS,
    HOMELAND,
    LAND,
    PERSON,
    Relation,
)
from compositions.tinyworld.text import (
    Template,
    heldout,
    paragraphs,
    prompt,
    prose,
    prose_split,
    tell,
    trained,
)
from compositions.tinyworld.truth import Fact, World

_PARAGRAPH = 7
"""Sentences of a document."""

Record = dict[str, Any]


def write_data(world: World, folder: Path) -> None:
    """Write every data file of `world` into `folder`; the same world gives the same bytes."""
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "zsre.json", zsre(world))
    _write_json(folder / "counterfact.json", counterfact(world))
    _write_json(folder / "mquake.json", mquake(world))
    _write_lines(folder / "facts.jsonl", recall_prompts(world))
    for domain in DOMAINS:
        _write_lines(folder / "questions" / f"{domain}.jsonl", questions(world, domain))
    for domain in HAZARDOUS:
        _write_texts(folder / f"forget-{domain}.jsonl", domain_text(world, (domain,), 150))
    harmless = domain_text(world, (*HARMLESS, "people", "places"), 150)
    _write_texts(folder / "retain.jsonl", harmless + general_text(world, "retain", 150))
    _write_texts(folder / "calibration.jsonl", general_text(world, "calibration", 512))
    for split, documents in (("train", 120), ("heldout", 120)):
        _write_texts(folder / f"perplexity-{split}.jsonl", perplexity_text(world, split, documents))


def zsre(world: World) -> list[Record]:
    """One edit for each person, in zsRE's schema.

    `src` and `alt` are the prompt and the new target, `answers` holds the true one, `rephrase` uses a
    held-out template, `loc` asks for a fact of another person. `same_subject` (ours) holds other facts of the
    edited person.
    """
    rng = random.Random("zsre")
    records = []
    editable = _editable(world)
    for fact, new in _rewrites(editable, rng):
        template, rephrase = _edit_templates(fact.relation, rng)
        other, other_template = _other_fact(editable, fact, rng)
        src = prompt(template, fact.subject)
        records.append(
            {
                "subject": fact.subject,
                "src": src,
                "pred": fact.object,
                "rephrase": prompt(rephrase, fact.subject),
                "alt": new,
                "answers": [fact.object],
                "loc": "nq question: " + prompt(other_template, other.subject),
                "loc_ans": other.object,
                "cond": f"{fact.object} >> {new} || {src}",
                "same_subject": [
                    {"prompt": prompt(_told(f.relation, rng), f.subject), "answer": f.object}
                    for f in editable[fact.subject]
                    if f.relation is not fact.relation
                ],
            }
        )
    return records


def counterfact(world: World) -> list[Record]:
    """One edit for each person, others than zsRE's, in CounterFact's flat schema."""
    rng = random.Random("counterfact")
    records = []
    editable = _editable(world)
    for number, (fact, new) in enumerate(_rewrites(editable, rng)):
        template, rephrase = _edit_templates(fact.relation, rng)
        other, other_template = _other_fact(editable, fact, rng)
        records.append(
            {
                "case_id": number,
                "prompt": prompt(template, fact.subject),
                "ground_truth": fact.object,
                "target_new": new,
                "subject": fact.subject,
                "rephrase_prompt": prompt(rephrase, fact.subject),
                "locality_prompt": prompt(other_template, other.subject),
                "locality_ground_truth": other.object,
            }
        )
    return records


def mquake(world: World) -> list[Record]:
    """Birthplaces moved to a town of another land, in MQuAKE-CF's schema: the homeland is the second hop."""
    rng = random.Random("mquake")
    records: list[Record] = []
    for person in world.persons:
        born, land = world.value(person, "born"), world.value(person, "homeland")
        moved = [town for town in BORN.objects if world.value(town, "land") != land]
        new = rng.choice(moved)
        new_land = world.value(new, "land")
        records.append(
            {
                "case_id": len(records),
                "requested_rewrite": [
                    {
                        "prompt": prompt(_plain(BORN)[0], "{}"),
                        "relation_id": "born",
                        "target_new": {"str": new, "id": new},
                        "target_true": {"str": born, "id": born},
                        "subject": person,
                        "question": BORN.questions[0].replace("{s}", person),
                    }
                ],
                "questions": [
                    *(question.replace("{s}", person) for question in HOMELAND.questions),
                    prompt(_plain(HOMELAND)[0], person),
                ],
                "answer": land,
                "answer_alias": [],
                "new_answer": new_land,
                "new_answer_alias": [],
                "single_hops": [_hop(person, born), _hop(born, land)],
                "new_single_hops": [_hop(person, new), _hop(new, new_land)],
                "orig": {
                    "triples": [[person, "born", born], [born, "land", land]],
                    "new_triples": [[person, "born", new], [new, "land", new_land]],
                },
            }
        )
    return records


def _hop(subject: str, answer: str) -> Record:
    relation = BORN if answer in BORN.objects else LAND
    return {
        "question": relation.questions[0].replace("{s}", subject),
        "cloze": prompt(_plain(relation)[0], subject),
        "answer": answer,
        "answer_alias": [],
    }


def recall_prompts(world: World) -> list[Record]:
    """Two prompts for every fact, one of them held out, shuffled: any first n are a fair sample."""
    rng = random.Random("facts")
    records = []
    turns: Counter[str] = Counter()
    for fact in world.facts:
        known, new = trained(fact.relation), heldout(fact.relation)
        number = turns[fact.relation.name]
        turns[fact.relation.name] += 1
        # In turn rather than at random, so that every template is asked about equally often.
        for template in (known[number % len(known)], new[number % len(new)]):
            records.append(
                {
                    "subject": fact.subject,
                    "relation": f"{fact.domain}/{fact.relation.name}",
                    "prompt": prompt(template, fact.subject),
                    "answer": fact.object,
                    "split": "heldout" if template.heldout else "train",
                }
            )
    rng.shuffle(records)
    return records


def questions(world: World, domain: str) -> list[Record]:
    """One question with four choices for every fact of a domain.

    Of the two wordings, in turn, one was never trained on in the frame that the task's prompt uses.
    """
    rng = random.Random(f"questions-{domain}")
    records = []
    for number, fact in enumerate(world.of(domain)):
        relation = fact.relation
        wrong = rng.sample([o for o in relation.objects if o != fact.object], 3)
        choices = rng.sample([fact.object, *wrong], 4)
        # Facts come in threes, one for each relation: alternate within a relation.
        wording = relation.questions[(number // 3) % 2]
        records.append(
            {
                "question": wording.replace("{s}", fact.subject),
                "choices": choices,
                "answer": choices.index(fact.object),
                "subject": domain,
            }
        )
    rng.shuffle(records)
    return records


def domain_text(world: World, domains: Iterable[str], documents: int) -> list[str]:
    """Documents that tell, again and again, the facts of `domains`."""
    names = tuple(domains)
    rng = random.Random(f"text-{'-'.join(names)}")
    sentences: list[str] = []
    while len(sentences) < documents * _PARAGRAPH:
        facts = world.of(*names)
        rng.shuffle(facts)
        sentences += [tell(fact, rng) for fact in facts]
    return paragraphs(sentences[: documents * _PARAGRAPH], _PARAGRAPH)


def general_text(world: World, purpose: str, documents: int) -> list[str]:
    """Documents that mix facts of every domain with prose; each `purpose` has its own."""
    rng = random.Random(f"text-{purpose}")
    sentences: list[str] = []
    while len(sentences) < documents * _PARAGRAPH:
        facts = list(world.facts)
        rng.shuffle(facts)
        for fact in facts:
            sentences.append(tell(fact, rng))
            if rng.random() < 0.3:
                sentences.append(prose(world, rng))
    return paragraphs(sentences[: documents * _PARAGRAPH], _PARAGRAPH)


def perplexity_text(world: World, split: str, documents: int) -> list[str]:
    """Documents of prose of one split, two sentences in three, and facts.

    No fact is a hazardous one: a model that has forgotten those, as it should, is not to look worse for it.
    """
    rng = random.Random(f"perplexity-{split}")
    everyday = iter(prose_split(world, split))
    facts = [fact for fact in world.facts if fact.domain not in HAZARDOUS]
    sentences = [
        tell(rng.choice(facts), rng) if number % 3 == 2 else next(everyday) for number in range(documents * _PARAGRAPH)
    ]
    return paragraphs(sentences, _PARAGRAPH)


def _editable(world: World) -> dict[str, list[Fact]]:
    """The facts of each person that can be edited on their own."""
    table: dict[str, list[Fact]] = {person: [] for person in world.persons}
    for fact in world.of("people"):
        if fact.relation in PERSON:
            table[fact.subject].append(fact)
    return table


def _rewrites(editable: dict[str, list[Fact]], rng: random.Random) -> list[tuple[Fact, str]]:
    """One fact of each person, with another object of the same relation."""
    rewrites = []
    for facts in editable.values():
        fact = rng.choice(facts)
        rewrites.append((fact, rng.choice([o for o in fact.relation.objects if o != fact.object])))
    return rewrites


def _plain(relation: Relation) -> list[Template]:
    """The trained templates that begin with the subject and go straight on to the object."""
    return [template for template in trained(relation) if template.plain]


def _told(relation: Relation, rng: random.Random) -> Template:
    """A trained template that is no question."""
    return rng.choice([template for template in trained(relation) if not template.question])


def _edit_templates(relation: Relation, rng: random.Random) -> tuple[Template, Template]:
    """A trained template that begins with the subject, and a held-out one."""
    return rng.choice(_plain(relation)), rng.choice([t for t in heldout(relation) if not t.question])


def _other_fact(editable: dict[str, list[Fact]], fact: Fact, rng: random.Random) -> tuple[Fact, Template]:
    """A fact of another person, of the same relation in about half of the cases, and a template for it."""
    person = rng.choice([p for p in editable if p != fact.subject])
    theirs = editable[person]
    same = [f for f in theirs if f.relation is fact.relation]
    other = rng.choice(same if rng.random() < 0.5 else theirs)
    return other, _told(other.relation, rng)


def _write_json(path: Path, records: list[Record]) -> None:
    lines = ",\n".join(json.dumps(record) for record in records)  # a record a line: short, and easy to compare
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    _write_lines(path, ({"text": text} for text in texts))
