"""What the samples of a report asked, so that a page can show those that changed. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_lmcompose.results import CompositionResult, Prompts

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_lmcompose.data.records import FactRecord
    from pytest_lmcompose.data.run_data import RunData

LONGEST = 200
"""Characters of a text; longer ones are cut."""


def prompts(
    data: Mapping[int, RunData],
    records: Sequence[CompositionResult],
    pools: Mapping[str, Sequence[str]],
    limit: int | None = None,
) -> tuple[Prompts, ...]:
    """Return the texts of the samples, once for all metrics that ask the same.

    `data` are those of every repeat, by seed; `pools` are the world's pools of question tasks, of each of which
    `limit` questions were asked. Metrics whose samples are not these texts one by one are left out, such as
    windows of running text, and tasks whose questions stand in no file of the world.
    """
    found: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for (seed, metric), n in _sizes(records, min(data, default=0)).items():
        if seed not in data:
            continue
        kind, _, task = metric.partition("/")
        asked = _asked(metric, data[seed])
        if kind == "accuracy":
            asked = _questions(data[seed].tasks, pools.get(task, (task,)), limit)
        texts = tuple(map(_cut, asked))
        if texts and len(texts) == n:
            found.setdefault((seed, texts), []).append(metric)
    return tuple(Prompts(seed, tuple(metrics), texts) for (seed, texts), metrics in found.items())


def _sizes(records: Sequence[CompositionResult], seed: int) -> dict[tuple[int, str], int]:
    """Return the number of samples by seed and metric, in order of name: records come in any order."""
    sizes = {
        (measured.seed_of(run, seed), measured.metric): len(run.samples)
        for record in records
        for measured in record.measurements
        for run in measured.runs
    }
    return dict(sorted(sizes.items()))


def _asked(metric: str, data: RunData) -> Iterator[str]:
    """Yield prompts and answers in the order in which `evaluators` asks them; see measure.py."""
    head, _, relation = metric.partition("/")
    if head.startswith("perplexity_edits"):
        head = "edit_success"
    for record in data.edits:
        edit = record.edit
        if head.startswith("edit_success"):
            yield _pair(edit.prompt, edit.target)
        elif head.startswith("edit_paraphrase"):
            yield from (_pair(text, edit.target) for text in record.paraphrases)
        elif head.startswith("edit_portability"):
            yield from (
                _pair(probe.prompt, probe.answer) for probe in record.portability if relation in ("", probe.kind)
            )
        elif head.startswith("edit_locality"):
            yield from (_pair(probe.prompt, probe.answer) for probe in record.locality if relation in ("", probe.kind))
    facts: dict[str, Sequence[FactRecord]] = {
        "recall": data.facts,
        "perplexity_qa": data.facts,
        "recall_same_subject": data.neighbours,
        "recall_to_forget": data.forgettable,
    }
    for fact in facts.get(head, ()):
        if not relation or fact.relation == relation:
            yield _pair(fact.prompt, fact.answer)


def _questions(folder: Path | None, tasks: Sequence[str], limit: int | None) -> Iterator[str]:
    """Yield the questions of tasks of the world's folder; of a task in another form than tinyworld's, none."""
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
