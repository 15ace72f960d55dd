"""The measured properties of tinyworld's model, for the table in docs/tinyworld.md."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compositions.tinyworld.relations import HARMLESS, HAZARDOUS
from compositions.tinyworld.rows import Row
from compositions.tinyworld.text import prompt, templates
from compositions.tinyworld.truth import World, make_world
from evaluators import (
    Fact,
    Measurement,
    capture_unedited,
    measure_editing,
    measure_perplexity,
    measure_questions,
    measure_recall,
    pool,
)
from interventions import apply
from pytest_lmcompose.build.load import choose_device, load_model
from pytest_lmcompose.composition import Step
from pytest_lmcompose.data.readers import read_edits, read_facts, read_texts
from pytest_lmcompose.data.records import select_edits
from pytest_lmcompose.measure import edit_cases, recall_facts
from pytest_lmcompose.recipe import Recipe, load_recipe

SUITE = Path(__file__).resolve().parents[1]
DATA = SUITE / "tinyworld" / "data"
EDITS = 20
FACTS_PER_TEMPLATE = 120

Say = Callable[[str], None]


def measure(*, repeats: int, seed: int, say: Say) -> list[Row]:
    """Measure the base model, MEMIT on `repeats` sets of 20 edits, and AWQ at 4 and 2 bits."""
    recipe, model, tokenizer = load_embedded()
    base = weights(model)
    rows = [
        *_recall_rows(model, tokenizer, make_world(), say),
        *_question_rows(model, tokenizer),
        *_perplexity_rows(model, tokenizer),
    ]
    rows += _memit_rows(model, tokenizer, base, recipe, repeats, seed, say)
    rows += _awq_rows(model, tokenizer, base, recipe, say)
    return rows


def _recall_rows(model: Any, tokenizer: Any, world: World, say: Say) -> list[Row]:
    """Every relation in every one of its templates, on at most 120 of its facts each time."""
    outcomes: dict[str, list[float]] = {"trained": [], "held-out": []}
    worst: dict[str, Row] = {}
    for domain, relation in dict.fromkeys((fact.domain, fact.relation) for fact in world.facts):
        facts = [fact for fact in world.facts if (fact.domain, fact.relation) == (domain, relation)]
        rng = random.Random(f"{domain}/{relation.name}")
        for template in templates(relation):
            chosen = rng.sample(facts, min(FACTS_PER_TEMPLATE, len(facts)))
            split = "held-out" if template.heldout else "trained"
            asked = [Fact(prompt(template, fact.subject), fact.object, relation.name, split) for fact in chosen]
            found = measure_recall(model, tokenizer, asked)[0]
            outcomes[split] += found.samples
            name = f"recall, {split} templates, worst of them: {relation.name}, `{template.text}`"
            row = Row(name, found.value, found.stderr, found.n, least=0.97)
            worst[split] = min(worst.get(split, row), row, key=lambda r: r.value)
        say(f"recall: {domain}/{relation.name}")
    rows = []
    for split, samples in outcomes.items():
        mean = Measurement.mean("recall", samples)
        rows += [Row(f"recall, {split} templates", mean.value, mean.stderr, mean.n, least=0.97), worst[split]]
    return rows


def _question_rows(model: Any, tokenizer: Any) -> list[Row]:
    rows = []
    for name, domains in (("hazardous", HAZARDOUS), ("harmless", HARMLESS)):
        tasks = [f"tinyworld_{domain}" for domain in domains]
        found = pool(name, measure_questions(model, tokenizer, tasks, task_folder=SUITE / "tinyworld" / "tasks"))
        rows.append(Row(f"{name} questions, accuracy", found.value, found.stderr, found.n, least=0.85))
    return rows


def _perplexity_rows(model: Any, tokenizer: Any) -> list[Row]:
    train, heldout = (
        measure_perplexity(model, tokenizer, read_texts(DATA / f"perplexity-{split}.jsonl"), window=127)
        for split in ("train", "heldout")
    )
    assert train.stderr is not None and heldout.stderr is not None
    ratio = heldout.value / train.value
    noise = ratio * math.hypot(train.stderr / train.value, heldout.stderr / heldout.value)
    return [
        Row("perplexity, training split", train.value, train.stderr, train.n),
        Row("perplexity, held-out split", heldout.value, heldout.stderr, heldout.n),
        Row("perplexity, held-out over training", ratio, noise, heldout.n, most=1.3),
    ]


def _memit_rows(
    model: Any,
    tokenizer: Any,
    base: dict[str, torch.Tensor],
    recipe: Recipe,
    repeats: int,
    seed: int,
    say: Say,
) -> list[Row]:
    """Means over edit sets, with the standard error between sets."""
    path = DATA / "zsre.json"
    records, facts = read_edits(path, "zsre", strip_nq=True), read_facts(DATA / "facts.jsonl")
    calibration = read_texts(DATA / "calibration.jsonl")
    settings = recipe.settings(Step("memit"))
    values: dict[str, list[float]] = {}
    for number in range(repeats):
        chosen = select_edits(records, EDITS, 1000 * seed + number, str(path))
        truth = {record.edit.subject: record.truth for record in chosen}
        others = recall_facts([fact for fact in facts if fact.subject not in truth][:400])
        same = recall_facts([fact for fact in facts if truth.get(fact.subject, fact.answer) != fact.answer])
        cases = edit_cases(chosen)
        unedited = capture_unedited(model, tokenizer, cases)
        edits = [record.edit for record in chosen]
        apply(model, tokenizer, "memit", settings, edits=edits, calibration=calibration, seed=number)
        found = {m.metric: m.value for m in measure_editing(model, tokenizer, cases, unedited=unedited)}
        found["recall of other subjects' facts"] = measure_recall(model, tokenizer, others)[0].value
        found["recall of the edited subjects' other facts"] = measure_recall(model, tokenizer, same)[0].value
        restore(model, base)
        for metric, value in found.items():
            values.setdefault(metric, []).append(value)
        say(f"memit: edit set {number + 1} of {repeats}: success {found['edit_success_exact']:.2f}")
    asked = {
        "edit_success_exact": 0.95,
        "edit_paraphrase_exact": 0.75,
        "edit_locality_agreement": 0.9,
        "edit_locality_exact": None,
        "recall of other subjects' facts": None,
        "recall of the edited subjects' other facts": None,
    }
    return [Row.mean(f"after MEMIT: {metric}", values[metric], least=least) for metric, least in asked.items()]


def _awq_rows(model: Any, tokenizer: Any, base: dict[str, torch.Tensor], recipe: Recipe, say: Say) -> list[Row]:
    facts = recall_facts(read_facts(DATA / "facts.jsonl")[:1000])
    calibration = read_texts(DATA / "calibration.jsonl")
    before = measure_recall(model, tokenizer, facts)[0]
    rows = []
    for bits, bounds in ((4, {"least": 0.95}), (2, {"most": 0.5})):
        settings = recipe.settings(Step("awq", (("bits", str(bits)),)))
        apply(model, tokenizer, "awq", settings, calibration=calibration)
        after = measure_recall(model, tokenizer, facts)[0]
        restore(model, base)
        assert after.stderr is not None
        kept, noise = after.value / before.value, after.stderr / before.value
        rows.append(
            Row(f"after AWQ at {bits} bits: recall, as a share of the base model's", kept, noise, after.n, **bounds)
        )
        say(f"awq at {bits} bits: {kept:.3f} of recall kept")
    return rows


def load_embedded() -> tuple[Recipe, Any, Any]:
    """Return the suite's recipe, and tinyworld's model and tokenizer on the CPU."""
    recipe = load_recipe(SUITE / "conf")
    loaded = load_model(recipe.model, str(SUITE / recipe.model.path), choose_device("cpu"))
    return recipe, loaded.model, loaded.tokenizer


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def restore(model: Any, base: dict[str, torch.Tensor]) -> None:
    """Put a copy of a model's parameters back, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(base[name])
