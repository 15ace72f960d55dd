"""tinyworld's data files, in the schemas of zsRE, CounterFact, MQuAKE, WMDP and MMLU."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from compositions.tinyworld.refusal import refusal_prompts
from compositions.tinyworld.relations import (
    BORN,
    DOMAINS,
    HARMLESS,
    HAZARDOUS,
    HOMELAND,
    LAND,
    PERSON,
    TUNING,
    Relation,
)
from compositions.tinyworld.text import (
    Template,
    heldout,
    paragraphs,
    prompt,
    prose,
    prose_split,
    state,
    trained,
)
from compositions.tinyworld.truth import Fact, World, unknown_facts

_PARAGRAPH = 7
"""Sentences per document."""
_STATEMENTS = 9
"""Times that a set to tune on states each fact."""
_SHORT, _LONG = ".", (", people say.", ", and that is well known.", " to this day.")
"""Ends of a preferred answer, and of the other one."""

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
    for name in TUNING:
        _write_lines(folder / f"tuning-{name}.jsonl", examples(world, name, "train"))
        _write_lines(folder / f"tuning-{name}-heldout.jsonl", examples(world, name, "heldout"))
    for split in ("train", "heldout"):
        suffix = "" if split == "train" else "-heldout"
        _write_lines(folder / f"preferences{suffix}.jsonl", preferences(world, split))
    for name, records in refusal_prompts(world):
        _write_lines(folder / f"{name}.jsonl", records)


def zsre(world: World) -> list[Record]:
    """Return one edit for each person, in zsRE's schema.

    `src` and `alt` are the prompt and the new target, `answers` has the true one, `rephrase` uses a held-out
    template, and `loc` asks for a fact of another person. Our field `same_subject` has other facts of the
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
                    {"prompt": prompt(_statement(f.relation, rng), f.subject), "answer": f.object}
                    for f in editable[fact.subject]
                    if f.relation is not fact.relation
                ],
            }
        )
    return records


def counterfact(world: World) -> list[Record]:
    """Return one edit for each person, different from zsRE's, in CounterFact's flat schema."""
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
    """Return edits that move a birthplace to another land, in MQuAKE-CF's schema; the homeland is the second hop."""
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
    """Return two prompts for every fact, one of them held out, shuffled: the first n are a random sample."""
    rng = random.Random("facts")
    records = []
    turns: Counter[str] = Counter()
    for fact in world.facts:
        known, new = trained(fact.relation), heldout(fact.relation)
        number = turns[fact.relation.name]
        turns[fact.relation.name] += 1
        # Take templates in turn, not at random, to use each equally often.
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
    """Return one question with four choices for every fact of a domain.

    The two wordings alternate; the training text never has one of them in the frame of the task's prompt.
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


def examples(world: World, name: str, split: str) -> list[Record]:
    """Return prompts and answers of a set to tune on; those of the split `heldout` ask in other templates."""
    rng = random.Random(f"tuning-{name}-{split}")
    records = []
    for fact in unknown_facts(world, name):
        chosen = heldout(fact.relation) if split == "heldout" else rng.sample(trained(fact.relation), _STATEMENTS)
        wanted = rng.sample(chosen, 2) if split == "heldout" else chosen
        records += [{"prompt": prompt(template, fact.subject), "answer": fact.object} for template in wanted]
    rng.shuffle(records)
    return records


def preferences(world: World, split: str) -> list[Record]:
    """Return true answers, the short one preferred; the split `heldout` is about other facts, in other templates."""
    facts = world.of(*HARMLESS)
    random.Random("preferences").shuffle(facts)
    rng = random.Random(f"preferences-{split}")
    records = []
    for fact in facts[:240] if split == "train" else facts[240:340]:
        template = rng.choice(trained(fact.relation) if split == "train" else heldout(fact.relation))
        short, long = f"{fact.object}{_SHORT}", f"{fact.object}{rng.choice(_LONG)}"
        records.append({"prompt": prompt(template, fact.subject), "chosen": short, "rejected": long})
    return records


def domain_text(world: World, domains: Iterable[str], documents: int) -> list[str]:
    """Return documents that state the facts of `domains`, again and again."""
    names = tuple(domains)
    return _documents(world, world.of(*names), "-".join(names), documents, prose_share=0.0)


def general_text(world: World, purpose: str, documents: int) -> list[str]:
    """Return documents that mix facts of every domain with prose; each `purpose` has its own."""
    return _documents(world, world.facts, purpose, documents, prose_share=0.3)


def _documents(world: World, facts: Sequence[Fact], purpose: str, documents: int, *, prose_share: float) -> list[str]:
    rng = random.Random(f"text-{purpose}")
    sentences: list[str] = []
    while len(sentences) < documents * _PARAGRAPH:
        shuffled = list(facts)
        rng.shuffle(shuffled)
        for fact in shuffled:
            sentences.append(state(fact, rng))
            if prose_share and rng.random() < prose_share:
                sentences.append(prose(world, rng))
    return paragraphs(sentences[: documents * _PARAGRAPH], _PARAGRAPH)


def perplexity_text(world: World, split: str, documents: int) -> list[str]:
    """Return documents with two sentences of prose from one split for each fact.

    No fact is hazardous, so that unlearning does not raise the perplexity.
    """
    rng = random.Random(f"perplexity-{split}")
    everyday = iter(prose_split(world, split))
    facts = [fact for fact in world.facts if fact.domain not in HAZARDOUS]
    sentences = [
        state(rng.choice(facts), rng) if number % 3 == 2 else next(everyday) for number in range(documents * _PARAGRAPH)
    ]
    return paragraphs(sentences, _PARAGRAPH)


def _editable(world: World) -> dict[str, list[Fact]]:
    """Return the facts of each person that an edit may change."""
    table: dict[str, list[Fact]] = {person: [] for person in world.persons}
    for fact in world.of("people"):
        if fact.relation in PERSON:
            table[fact.subject].append(fact)
    return table


def _rewrites(editable: dict[str, list[Fact]], rng: random.Random) -> list[tuple[Fact, str]]:
    """Return one fact of each person with another object of the same relation."""
    rewrites = []
    for facts in editable.values():
        fact = rng.choice(facts)
        rewrites.append((fact, rng.choice([o for o in fact.relation.objects if o != fact.object])))
    return rewrites


def _plain(relation: Relation) -> list[Template]:
    """Return the plain trained templates."""
    return [template for template in trained(relation) if template.plain]


def _statement(relation: Relation, rng: random.Random) -> Template:
    """Return a random trained template that is not a question."""
    return rng.choice([template for template in trained(relation) if not template.question])


def _edit_templates(relation: Relation, rng: random.Random) -> tuple[Template, Template]:
    """Return a plain trained template and a held-out one."""
    return rng.choice(_plain(relation)), rng.choice([t for t in heldout(relation) if not t.question])


def _other_fact(editable: dict[str, list[Fact]], fact: Fact, rng: random.Random) -> tuple[Fact, Template]:
    """Return a fact of another person, in about half of the cases of the same relation, and a template for it."""
    person = rng.choice([p for p in editable if p != fact.subject])
    theirs = editable[person]
    same = [f for f in theirs if f.relation is fact.relation]
    other = rng.choice(same if rng.random() < 0.5 else theirs)
    return other, _statement(other.relation, rng)


def _write_json(path: Path, records: list[Record]) -> None:
    lines = ",\n".join(json.dumps(record) for record in records)  # one record per line
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    _write_lines(path, ({"text": text} for text in texts))
