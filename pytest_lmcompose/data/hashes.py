"""Hash the parts of the data, because only answers to the same questions can be paired. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from evaluators.metrics import find_metric
from evaluators.settings import RefusalSettings, UnlearningSettings
from pytest_lmcompose.cache.address import address, hash_files

if TYPE_CHECKING:
    from pytest_lmcompose.data.run_data import RunData
    from pytest_lmcompose.settings import EvaluateSettings, WorldSettings

METHODS = "methods"
"""The part of the data that only methods read."""
_LENGTH = 16


def data_part(metric: str) -> str | None:
    """Return the part of the data that a metric is measured on, None if unknown."""
    part = find_metric(metric).data
    known = ("edits", "facts", "texts", "questions", "unlearning data", "tuning data", "refusal prompts")
    return part if part in known else None


def data_hashes(
    data: Sequence[RunData], world: WorldSettings, evaluate: EvaluateSettings, folder: Path, retain_model: str = ""
) -> dict[str, str]:
    """Return a hash of each part of the data of all repeats, including the settings that apply to it.

    `retain_model` identifies the model that unlearning is compared with.

    Datasets that a task fetches from a hub count by the text of the task alone.
    """
    chat = {} if evaluate.chat is None else {"chat": evaluate.chat}
    parts = {
        "edits": address(edits=[d.edits for d in data], **chat),
        "facts": address(facts=[[d.facts, d.neighbours, d.forgettable] for d in data], **chat),
        "texts": address(texts=[d.perplexity for d in data], window=evaluate.window),
        "questions": address(
            files=question_files(world, evaluate, folder),
            pools=world.pools,
            hazardous=world.hazardous,
            tasks=evaluate.tasks,
            limit=evaluate.question_limit,
            shots=evaluate.num_fewshot,
            **({"sequential": True} if evaluate.sequential else {}),
            repeats=len(data),
            **chat,
        ),
        "unlearning data": address(
            data=[d.unlearning for d in data],
            retain_model=retain_model,
            settings={field.name: getattr(evaluate, field.name) for field in fields(UnlearningSettings)},
            **chat,
        ),
        "tuning data": address(data=[d.tuning for d in data], **chat),
        "refusal prompts": address(
            data=[d.refusal for d in data],
            settings={field.name: getattr(evaluate, field.name) for field in fields(RefusalSettings)},
            **chat,
        ),
        METHODS: address(resources=[d.resources for d in data]),
    }
    return {name: digest[:_LENGTH] for name, digest in parts.items()}


def question_files(world: WorldSettings, evaluate: EvaluateSettings, folder: Path) -> str:
    """Return the hash of the files of the question tasks, empty if there are none."""
    if world.tasks is None or not evaluate.questions:
        return ""
    from evaluators.task_files import task_files

    names = [*evaluate.tasks, *(name for pool in world.pools.values() for name in pool)]
    return hash_files(task_files(folder / world.tasks, names))
