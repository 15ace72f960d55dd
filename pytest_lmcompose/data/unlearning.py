"""Read the data of TOFU and MUSE that show what a model forgot. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluators.data import Probe, Question
from pytest_lmcompose.data.records import Record
from pytest_lmcompose.data.sources import read_source
from pytest_lmcompose.data.templates import QA_TEMPLATE, qa_prompt, qa_text

PARAPHRASED, PERTURBED = "paraphrased_answer", "perturbed_answer"


def read_questions(
    source: Any, folder: Path = Path(), *, template: str = QA_TEMPLATE, examples: tuple[Question, ...] = ()
) -> tuple[Question, ...]:
    """Read `question` and `answer`, and `perturbed_answer` and `paraphrased_answer` if the first record has them.

    The prompt is the question in `template`, after `examples` with their answers and a blank line each. Raises
    WorldError for a field that is missing or empty.
    """
    shown = "".join(qa_text(template, one.question, one.answer) + "\n\n" for one in examples)
    return tuple(
        Question(
            record.text("question"),
            shown + qa_prompt(template, record.text("question")),
            record.text("answer"),
            record.text(PARAPHRASED) if PARAPHRASED in extra else "",
            _wrong(record) if PERTURBED in extra else (),
        )
        for record, extra in _with_extra(source, folder)
    )


def _with_extra(source: Any, folder: Path) -> Iterator[tuple[Record, set[str]]]:
    """Yield records with the optional fields that the first one has."""
    extra: set[str] | None = None
    for record in read_source(source, folder):
        if extra is None:
            extra = {name for name in (PARAPHRASED, PERTURBED) if record.data.get(name)}
        yield record, extra


def _wrong(record: Record) -> tuple[str, ...]:
    found = record.texts(PERTURBED)
    if not found:
        raise record.error(f"field {PERTURBED!r} has no answer")
    return found


def read_verbatim(source: Any, folder: Path = Path()) -> tuple[Probe, ...]:
    """Read `prompt` and `gt`, the text after it. Raises WorldError for a field that is missing or empty."""
    return tuple(Probe(record.text("prompt"), record.text("gt")) for record in read_source(source, folder))
