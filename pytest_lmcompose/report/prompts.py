"""Prompts of the samples, for showing changed samples. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_lmcompose.results import CompositionResult, Prompts

if TYPE_CHECKING:
    from pathlib import Path

    from evaluators.data import Fact
    from pytest_lmcompose.data.run_data import RunData

LONGEST = 200
"""Maximum length in characters; longer texts are cut."""
_OF_QA = ("rouge", "answer_probability", "truth_ratio", "extraction_strength")
"""Metrics of the questions of `world.qa`."""


def prompts(
    data: Mapping[int, RunData],
    records: Sequence[CompositionResult],
    pools: Mapping[str, Sequence[str]],
    limit: int | None = None,
    *,
    sequential: bool = False,
) -> tuple[Prompts, ...]:
    """Return the prompts of each metric's samples, once for all metrics that share them.

    `data` maps the seed of each repeat to its data; `pools` are the world's pools of question tasks, limited to
    `limit` questions per task. Metrics without one prompt per sample are left out, such as perplexity of running
    text, and so are tasks without a question file in the world, and all if they are `sequential`: asked in parts.
    """
    found: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for (seed, metric), n in _sizes(records, min(data, default=0)).items():
        if seed not in data:
            continue
        kind, _, task = metric.partition("/")
        pairs = _prompts(metric, data[seed])
        if kind == "accuracy" and not sequential:
            pairs = _questions(data[seed].tasks, pools.get(task, (task,)), limit)
        texts = tuple(map(_cut, pairs))
        if texts and len(texts) == n:
            found.setdefault((seed, texts), []).append(metric)
    return tuple(Prompts(seed, tuple(metrics), texts) for (seed, texts), metrics in found.items())


def _sizes(records: Sequence[CompositionResult], seed: int) -> dict[tuple[int, str], int]:
    """Return the number of samples by seed and metric, sorted."""
    sizes = {
        (measured.seed_of(run, seed), measured.metric): len(run.samples)
        for record in records
        for measured in record.measurements
        for run in measured.runs
    }
    return dict(sorted(sizes.items()))


def _prompts(metric: str, data: RunData) -> Iterator[str]:
    """Yield prompts with their answers, in the order of the evaluators' samples."""
    head, _, relation = metric.partition("/")
    if head.startswith("perplexity_edits"):
        head = "edit_success"
    for record in data.edits:
        if head.startswith("edit_success"):
            yield _pair(record.prompt, record.target)
        elif head.startswith("edit_paraphrase"):
            yield from (_pair(text, record.target) for text in record.paraphrases)
        elif head.startswith("edit_portability"):
            yield from (
                _pair(probe.prompt, probe.answer) for probe in record.portability if relation in ("", probe.kind)
            )
        elif head.startswith("edit_locality"):
            yield from (_pair(probe.prompt, probe.answer) for probe in record.locality if relation in ("", probe.kind))
    facts: dict[str, Sequence[Fact]] = {
        "recall": data.facts,
        "perplexity_qa": data.facts,
        "recall_same_subject": data.neighbours,
        "recall_to_forget": data.forgettable,
    }
    unlearning = data.unlearning
    questions = {"knowmem": unlearning.knowledge}.get(head, unlearning.qa if head in _OF_QA else {})
    yield from (_pair(question.question, question.answer) for question in questions.get(relation, ()))
    if metric in ("verbmem", "extraction_strength/verbatim"):
        yield from (_pair(probe.prompt, probe.answer) for probe in unlearning.verbatim)
    if head in ("membership_auc", "privleak", "privleak_distance"):
        yield from unlearning.membership.get("forget", ())
    if head in ("tuning_loss", "tuning_recall"):
        yield from (_pair(example.prompt, example.answer) for example in data.tuning.sets.get(relation, ()))
    if head == "preference_wins":
        yield from (_pair(one.prompt, f"{one.chosen}, not {one.rejected}") for one in data.tuning.preferences)
    if (name := {"refusal": "harmful", "over_refusal": "harmless"}.get(metric.rpartition("_")[0])) is not None:
        yield from data.refusal.get(name, ())
    for fact in facts.get(head, ()):
        if not relation or fact.relation == relation:
            yield _pair(fact.prompt, fact.answer)


def _questions(folder: Path | None, tasks: Sequence[str], limit: int | None) -> Iterator[str]:
    """Yield the questions of tasks in the world's folder; none if a task does not have tinyworld's format."""
    import yaml

    if folder is None:
        return
    for task in tasks:
        path = folder / f"{task}.yaml"
        try:
            (file,) = yaml.safe_load(path.read_text(encoding="utf-8"))["dataset_kwargs"]["data_files"].values()
            lines = (path.parent / file).read_text(encoding="utf-8").splitlines()
            yield from [str(json.loads(line)["question"]) for line in lines[:limit]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            return


def _pair(prompt: str, answer: str) -> str:
    return f"{prompt} → {answer}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
