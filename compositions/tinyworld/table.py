"""The measured properties of tinyworld's model, as the table in docs/tinyworld.md."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from compositions.tinyworld.relations import HARMLESS, HAZARDOUS
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
from pytest_lmcompose.composition import Step
from pytest_lmcompose.load import choose_device, load_model
from pytest_lmcompose.measure import edit_cases, recall_facts
from pytest_lmcompose.recipe import Recipe, load_recipe
from pytest_lmcompose.world import read_edits, read_facts, read_texts, select_edits

SUITE = Path(__file__).resolve().parents[1]
DATA = SUITE / "tinyworld" / "data"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, its value with noise, and what is asked of it."""

    name: str
    value: float
    stderr: float | None
    n: int
    needed: str
    met: bool

    def markdown(self) -> str:
        noise = "" if self.stderr is None else f" ± {self.stderr:.3f}"
        return (
            f"| {self.name} | {self.value:.3f}{noise} | {self.n} | {self.needed} | {'yes' if self.met else '**no**'} |"
        )


def write_table(out: Path, *, edit_sets: int, seed: int, say: Callable[[str], None]) -> list[Row]:
    """Measure everything and put the table between the marks in the file `out`."""
    rows = measure(edit_sets=edit_sets, seed=seed, say=say)
    head = "| what | value ± standard error | n | needed | met |\n|---|---|---|---|---|\n"
    table = head + "\n".join(row.markdown() for row in rows)
    text = out.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    out.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    return rows


BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def measure(*, edit_sets: int, seed: int, say: Callable[[str], None]) -> list[Row]:
    """Measure the base model, MEMIT on `edit_sets` sets of 20 edits, and AWQ at 4 and 2 bits."""
    recipe = load_recipe(SUITE / "conf")
    loaded = load_model(recipe.model, str(SUITE / recipe.model.path), choose_device("cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [*_recall_rows(model, tokenizer, make_world(), say), *_question_rows(model, tokenizer)]
    rows += _perplexity_rows(model, tokenizer)
    rows += _memit_rows(model, tokenizer, base, recipe, edit_sets, seed, say)
    rows += _awq_rows(model, tokenizer, base, recipe, say)
    return rows


def _recall_rows(model: Any, tokenizer: Any, world: World, say: Callable[[str], None]) -> list[Row]:
    """Every fact in every template of its relation."""
    known: dict[str, list[float]] = {"train": [], "heldout": []}
    worst: dict[str, tuple[float, str, int]] = {"train": (2.0, "", 0), "heldout": (2.0, "", 0)}
    domains = dict.fromkeys((fact.domain, fact.relation) for fact in world.facts)
    for domain, relation in domains:
        facts = [fact for fact in world.facts if (fact.domain, fact.relation) == (domain, relation)]
        for template in templates(relation):
            split = "heldout" if template.heldout else "train"
            asked = [Fact(prompt(template, fact.subject), fact.object, relation.name, split) for fact in facts]
            outcome = measure_recall(model, tokenizer, asked)[0]
            known[split] += outcome.samples
            worst[split] = min(worst[split], (outcome.value, f"{relation.name}: {template.text}", outcome.n))
        say(f"recall: {domain}/{relation.name}")
    rows = []
    for split, name in (("train", "trained templates"), ("heldout", "held-out templates")):
        mean = Measurement.mean("recall", known[split])
        rows.append(
            Row(
                f"recall, greedy, {name}: mean",
                mean.value,
                mean.stderr,
                mean.n,
                ">= 0.97",
                mean.value >= 0.97,
            )
        )
        value, which, n = worst[split]
        stderr = math.sqrt(value * (1 - value) / n)
        rows.append(Row(f"recall, {name}: worst (`{which}`)", value, stderr, n, ">= 0.97", value >= 0.97))
    return rows


def _question_rows(model: Any, tokenizer: Any) -> list[Row]:
    rows = []
    for name, domains in (("hazardous", HAZARDOUS), ("harmless", HARMLESS)):
        tasks = [f"tinyworld_{domain}" for domain in domains]
        found = pool(name, measure_questions(model, tokenizer, tasks, task_folder=SUITE / "tinyworld" / "tasks"))
        rows.append(
            Row(
                f"{name} questions, accuracy",
                found.value,
                found.stderr,
                found.n,
                ">= 0.85",
                found.value >= 0.85,
            )
        )
    return rows


def _perplexity_rows(model: Any, tokenizer: Any) -> list[Row]:
    found = {
        split: measure_perplexity(model, tokenizer, read_texts(DATA / f"perplexity-{split}.jsonl"), window=127)
        for split in ("train", "heldout")
    }
    train, heldout = found["train"], found["heldout"]
    assert train.stderr is not None and heldout.stderr is not None
    ratio = heldout.value / train.value
    noise = ratio * math.hypot(train.stderr / train.value, heldout.stderr / heldout.value)
    return [
        Row("perplexity, training split", train.value, train.stderr, train.n, "", True),
        Row("perplexity, held-out split", heldout.value, heldout.stderr, heldout.n, "", True),
        Row("perplexity, held-out / training", ratio, noise, heldout.n, "<= 1.3", ratio <= 1.3),
    ]


def _memit_rows(
    model: Any,
    tokenizer: Any,
    base: dict[str, torch.Tensor],
    recipe: Recipe,
    edit_sets: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Means over edit sets, with the standard error between sets."""
    path = DATA / "zsre.json"
    records = read_edits(path, "zsre", strip_nq=True)
    facts = read_facts(DATA / "facts.jsonl")
    values: dict[str, list[float]] = {}
    calibration = read_texts(DATA / "calibration.jsonl")
    for number in range(edit_sets):
        chosen = select_edits(records, 20, seed * edit_sets + number, str(path))
        truth = {record.edit.subject: record.truth for record in chosen}
        others = recall_facts([fact for fact in facts if fact.subject not in truth][:400])
        same = recall_facts([fact for fact in facts if truth.get(fact.subject, fact.answer) != fact.answer])
        cases = edit_cases(chosen)
        restore(model, base)
        unedited = capture_unedited(model, tokenizer, cases)
        edits = [record.edit for record in chosen]
        apply(
            model,
            tokenizer,
            "memit",
            recipe.settings(Step("memit")),
            edits=edits,
            calibration=calibration,
            seed=number,
        )
        found = {m.metric: m.value for m in measure_editing(model, tokenizer, cases, unedited=unedited)}
        found["recall of other subjects' facts"] = measure_recall(model, tokenizer, others)[0].value
        found["recall of the same subjects' other facts"] = measure_recall(model, tokenizer, same)[0].value
        for metric, value in found.items():
            values.setdefault(metric, []).append(value)
        say(f"memit: edit set {number + 1} of {edit_sets}: success {found['edit_success_exact']:.2f}")
    restore(model, base)
    needed = {"edit_success_exact": 0.95, "edit_paraphrase_exact": 0.75, "edit_locality_agreement": 0.9}
    rows = []
    for metric in (
        *needed,
        "edit_locality_exact",
        "recall of other subjects' facts",
        "recall of the same subjects' other facts",
    ):
        mean, stderr = _over_sets(values[metric])
        least = needed.get(metric)
        asked = "" if least is None else f">= {least}"
        rows.append(Row(f"after MEMIT: {metric}", mean, stderr, edit_sets, asked, least is None or mean >= least))
    return rows


def _awq_rows(
    model: Any, tokenizer: Any, base: dict[str, torch.Tensor], recipe: Recipe, say: Callable[[str], None]
) -> list[Row]:
    facts = recall_facts(read_facts(DATA / "facts.jsonl")[:1000])
    calibration = read_texts(DATA / "calibration.jsonl")
    before = measure_recall(model, tokenizer, facts)[0]
    rows = []
    for bits in (4, 2):
        settings = recipe.settings(Step("awq", (("bits", str(bits)),)))
        apply(model, tokenizer, "awq", settings, calibration=calibration)
        after = measure_recall(model, tokenizer, facts)[0]
        restore(model, base)
        kept = after.value / before.value
        assert after.stderr is not None
        needed, met = (">= 0.95", kept >= 0.95) if bits == 4 else ("<= 0.5", kept <= 0.5)
        rows.append(
            Row(
                f"after AWQ at {bits} bits: recall kept",
                kept,
                after.stderr / before.value,
                after.n,
                needed,
                met,
            )
        )
        say(f"awq at {bits} bits: {kept:.3f} of recall kept")
    return rows


@torch.no_grad()
def restore(model: Any, base: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of `base` back into the model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(base[name])


def _over_sets(values: Sequence[float]) -> tuple[float, float | None]:
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), stderr
