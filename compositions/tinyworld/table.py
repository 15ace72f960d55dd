"""The measured properties of tinyworld's model, for the table in docs/tinyworld.md."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from compositions.tinyworld.bench import Bench, Log, Row
from compositions.tinyworld.relations import HARMLESS, HAZARDOUS
from compositions.tinyworld.text import prompt, templates
from compositions.tinyworld.truth import make_world
from evaluators import Fact, Measurement, measure_recall

FACTS_PER_TEMPLATE = 120


def measure_model(*, repeats: int, seed: int, log: Log) -> list[Row]:
    """Measure the base model, MEMIT on `repeats` sets of 20 edits, and AWQ at 4 and 2 bits."""
    bench = Bench()
    seeds = [1000 * seed + number for number in range(repeats)]
    return [*_recall_rows(bench, log), *_base_rows(bench), *_memit_rows(bench, seeds, log), *_awq_rows(bench, log)]


def _recall_rows(bench: Bench, log: Log) -> Iterator[Row]:
    """Measure every relation in every one of its templates, on at most 120 facts each."""
    world = make_world()
    outcomes: dict[str, list[float]] = {"trained": [], "held-out": []}
    worst: dict[str, Row] = {}
    for domain, relation in dict.fromkeys((fact.domain, fact.relation) for fact in world.facts):
        facts = [fact for fact in world.facts if (fact.domain, fact.relation) == (domain, relation)]
        rng = random.Random(f"{domain}/{relation.name}")
        for template in templates(relation):
            chosen = rng.sample(facts, min(FACTS_PER_TEMPLATE, len(facts)))
            split = "held-out" if template.heldout else "trained"
            prompts = [Fact(prompt(template, fact.subject), fact.object, relation.name, split) for fact in chosen]
            measured = measure_recall(bench.model, bench.tokenizer, prompts)[0]
            outcomes[split] += measured.samples
            name = f"recall, {split} templates, worst of them: {relation.name}, `{template.text}`"
            row = Row.of(name, measured, least=0.97)
            worst[split] = min(worst.get(split, row), row, key=lambda r: r.value)
        log(f"recall: {domain}/{relation.name}")
    for split, samples in outcomes.items():
        yield Row.of(f"recall, {split} templates", Measurement.mean("recall", samples), least=0.97)
        yield worst[split]


def _base_rows(bench: Bench) -> Iterator[Row]:
    for name, domains in (("hazardous", HAZARDOUS), ("harmless", HARMLESS)):
        yield Row.of(f"{name} questions, accuracy", bench.questions(name, domains), least=0.85)
    train, heldout = bench.perplexity("train"), bench.perplexity("heldout")
    assert train.stderr is not None and heldout.stderr is not None
    ratio = heldout.value / train.value
    noise = ratio * math.hypot(train.stderr / train.value, heldout.stderr / heldout.value)
    yield Row.of("perplexity, training split", train)
    yield Row.of("perplexity, held-out split", heldout)
    yield Row("perplexity, held-out over training", ratio, noise, heldout.n, most=1.3)


def _memit_rows(bench: Bench, seeds: list[int], log: Log) -> Iterator[Row]:
    """Yield means over edit sets, with the standard error between sets."""
    bounds = {
        "edit_success_exact": 0.95,
        "edit_paraphrase_exact": 0.75,
        "edit_locality_agreement": 0.9,
        "edit_locality_exact": None,
        "recall of other subjects' facts": None,
        "recall of the edited subjects' other facts": None,
    }
    values: dict[str, list[float]] = {metric: [] for metric in bounds}
    for seed in seeds:
        measured = bench.edit("memit", seed)
        truth = {record.edit.subject: record.truth for record in bench.edits(seed)}
        others = [fact for fact in bench.facts if fact.subject not in truth][:400]
        same = [fact for fact in bench.facts if truth.get(fact.subject, fact.answer) != fact.answer]
        measured["recall of other subjects' facts"] = bench.recall(others).value
        measured["recall of the edited subjects' other facts"] = bench.recall(same).value
        for metric, column in values.items():
            column.append(measured[metric])
        log(f"memit: edit set {seed}: success {measured['edit_success_exact']:.2f}")
    for metric, least in bounds.items():
        yield Row.mean(f"after MEMIT: {metric}", values[metric], least=least)


def _awq_rows(bench: Bench, log: Log) -> Iterator[Row]:
    bench.restore()
    facts = bench.facts[:1000]
    before = bench.recall(facts)
    for bits, bounds in ((4, {"least": 0.95}), (2, {"most": 0.5})):
        bench.apply(f"awq[bits={bits}]")
        after = bench.recall(facts)
        assert after.stderr is not None
        kept, noise = after.value / before.value, after.stderr / before.value
        yield Row(f"after AWQ at {bits} bits: recall, as a share of the base model's", kept, noise, after.n, **bounds)
        log(f"awq at {bits} bits: {kept:.3f} of recall kept")
