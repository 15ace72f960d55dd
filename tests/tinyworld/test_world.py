"""tinyworld's truth and text: consistent, reproducible, and held out where it says so."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from compositions.tinyworld.datasets import write_data
from compositions.tinyworld.relations import DOMAINS, HOMELAND, LAND, PERSON, TUNING
from compositions.tinyworld.text import heldout, prompt, state, templates, trained, training_stream
from compositions.tinyworld.truth import LEARNERS, World, make_world, unknown_facts
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.tuning import read_examples, read_preferences

SHIPPED = Path(__file__).parents[2] / "compositions" / "tinyworld" / "data"
RELATIONS = [*PERSON, HOMELAND, LAND, *(r for relations in DOMAINS.values() for r in relations)]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert make_world() == world
    assert make_world(1) != world


def test_every_subject_has_one_object_for_each_relation(world: World) -> None:
    pairs = [(fact.subject, fact.relation.name) for fact in world.facts]
    assert len(pairs) == len(set(pairs))
    assert all(fact.object in fact.relation.objects for fact in world.facts)


def test_the_homeland_follows_from_the_birthplace(world: World) -> None:
    for person in world.persons:
        assert world.value(person, "homeland") == world.value(world.value(person, "born"), "land")


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_what_is_held_out_is_made_of_trained_parts(relation: object) -> None:
    known, new = trained(relation), heldout(relation)  # type: ignore[arg-type]
    assert new
    assert not {template.text for template in new} & {template.text for template in known}
    assert any(template.question for template in new)
    assert len(known) > 2 * len(new)
    for phrase in (*relation.verbs, *(lead for _, lead in relation.nouns)):  # type: ignore[attr-defined]
        assert any(f" {phrase} {{o}}" in template.text for template in known)


def test_training_text_never_uses_a_heldout_template(world: World) -> None:
    rng = random.Random(0)
    banned = {prompt(t, f.subject) for f in world.facts for t in heldout(f.relation)}
    for sentence in training_stream(world, rng, epochs=2):
        words = sentence.split(" ")
        assert not banned & {" ".join(words[:n]) for n in range(2, len(words))}


def test_every_template_ends_in_the_object(world: World) -> None:
    for fact in world.facts[:: len(world.facts) // 100]:
        for template in templates(fact.relation):
            assert prompt(template, fact.subject) + " {o}" == template.text.replace("{s}", fact.subject)
        assert fact.subject in state(fact, random.Random(1))


def test_the_shipped_data_is_what_the_script_makes(world: World, tmp_path: Path) -> None:
    write_data(world, tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json*"))
    assert made == sorted(path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.json*"))
    for path in made:
        assert (SHIPPED / path).read_bytes() == (tmp_path / path).read_bytes(), f"{path} is not up to date"


@pytest.mark.parametrize("schema", ["zsre", "counterfact", "mquake"])
def test_the_edits_read_as_the_real_sets_do_and_are_about_what_is_true(schema: str, world: World) -> None:
    records = read_edits(SHIPPED / f"{schema}.json", schema, strip_nq=True)
    facts = {(fact.subject, fact.object) for fact in world.facts}
    assert len(records) >= 300
    for record in records:
        assert (record.edit.subject, record.truth) in facts
        assert record.edit.target != record.truth
        for probe in record.locality:
            assert any(subject in probe.prompt and answer == probe.answer for subject, answer in facts)


def test_edits_are_asked_about_in_heldout_words(world: World) -> None:
    banned = {prompt(t, f.subject) for f in world.of("people") for t in trained(f.relation)}
    for record in read_edits(SHIPPED / "zsre.json", "zsre", strip_nq=True):
        assert record.edit.prompt in banned
        assert not banned & set(record.paraphrases)


def test_questions_have_one_right_answer_among_four(world: World) -> None:
    for domain in DOMAINS:
        right = {(fact.subject, fact.object) for fact in world.of(domain)}
        lines = (SHIPPED / "questions" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(world.of(domain))
        for record in map(json.loads, lines):
            assert len(set(record["choices"])) == 4
            asked = next(s for s, _ in right if s in record["question"])
            answer = record["choices"][record["answer"]]
            assert (asked, answer) in right


def test_no_text_serves_two_purposes() -> None:
    names = ["retain", "calibration", "perplexity-train", "perplexity-heldout"]
    texts = {name: set(read_texts(SHIPPED / f"{name}.jsonl")) for name in names}
    for name in names:
        for other in names:
            assert name == other or not texts[name] & texts[other]


def test_recall_prompts_cover_every_fact_and_as_many_templates_as_there_are_subjects(world: World) -> None:
    facts = read_facts(SHIPPED / "facts.jsonl")
    assert {(f.subject, f.answer) for f in facts} == {(f.subject, f.object) for f in world.facts}
    asked = {fact.prompt.replace(fact.subject, "{s}") for fact in facts}
    for relation in RELATIONS:
        subjects = sum(fact.relation is relation for fact in world.facts)
        for kind in (trained(relation), heldout(relation)):  # in turn, so all of them where there are subjects enough
            found = asked & {prompt(template, "{s}") for template in kind}
            assert len(found) == min(subjects, len(kind)), relation.name


@pytest.mark.parametrize("name", TUNING)
def test_tuning_states_facts_about_strangers_and_asks_in_other_words(name: str, world: World) -> None:
    known = {fact.subject for fact in world.facts} | set(world.name_parts)
    facts = {(fact.subject, fact.object) for fact in unknown_facts(world, name)}
    assert len({subject for subject, _ in facts}) == LEARNERS
    assert not known & {subject for subject, _ in facts}
    training, tested = (read_examples(SHIPPED / f"tuning-{name}{part}.jsonl") for part in ("", "-heldout"))
    for examples in (training, tested):
        assert {(s, e.answer) for e in examples for s, _ in facts if s in e.prompt} == facts
    assert not {example.prompt for example in training} & {example.prompt for example in tested}


def test_sets_to_tune_on_have_no_subject_in_common(world: World) -> None:
    subjects = [{fact.subject for fact in unknown_facts(world, name)} for name in TUNING]
    assert not set.intersection(*subjects)


def test_preferences_are_true_and_held_out_about_other_facts(world: World) -> None:
    training, tested = (read_preferences(SHIPPED / f"preferences{part}.jsonl") for part in ("", "-heldout"))
    answers = {(fact.subject, fact.object) for fact in world.facts}
    asked = []
    for pairs in (training, tested):
        about = {next((s, o) for s, o in answers if s in p.prompt and p.chosen == f"{o}.") for p in pairs}
        asked.append(about)
        assert all(len(p.chosen) < len(p.rejected) for p in pairs)
    assert not asked[0] & asked[1]
