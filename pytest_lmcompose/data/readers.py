"""Read edit files: a table of readers by schema, which other packages can extend. Imports no torch.

An edit file is a JSON list. A reader takes one record of it and yields its edits:

    def mine(record: Record, options: ReadOptions) -> Iterator[EditRecord]: ...

A package adds a reader by an entry point of the group `lmcompose.edit_readers`, named after the schema; a notebook or a
`conftest.py` calls `register("mine", mine)`. Then `world.edits_schema=mine` reads such files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, TypeAlias

from interventions.names import near_names
from interventions.types import Edit
from pytest_lmcompose.data.records import EditRecord, Probe, Record, WorldError, read_json

ENTRY_POINT_GROUP = "lmcompose.edit_readers"
NQ_PREFIX = "nq question: "


class ReadOptions(NamedTuple):
    """The settings of a world for its edits."""

    strip_nq: bool = True
    """Remove zsRE's "nq question: " before locality prompts."""
    ask_as: str = "{}"
    """Template for prompts that end with a question mark; {} is the question."""


Reader: TypeAlias = Callable[[Record, ReadOptions], Iterator[EditRecord]]


def read_edits(path: Path, schema: str, *, strip_nq: bool = True, ask_as: str = "{}") -> list[EditRecord]:
    """Read an edit file in a schema such as `zsre`, `counterfact` or `mquake`.

    Raises WorldError for an unknown schema, a missing or empty field, and a subject that is not in its prompt. Record
    numbers in errors start at 1.
    """
    if (problem := unknown_schema(schema)) is not None:
        raise WorldError(f"{path}: the schema is {schema!r}, {problem}")
    read, options = edit_readers()[schema], ReadOptions(strip_nq, ask_as)
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise WorldError(f"{path}: expected a list with at least one record")
    return [e for number, data in enumerate(records, start=1) for e in read(Record(path, number, data), options)]


def unknown_schema(schema: str) -> str | None:
    """Return the problem with an unknown schema, with similar names; None if it is known."""
    known = edit_readers()
    if schema in known:
        return None
    return f"expected one of {', '.join(known)}.{near_names(schema, known)}".removesuffix(".")


@cache
def edit_readers() -> dict[str, Reader]:
    """Return all readers by schema, built-in ones first."""
    table: dict[str, Reader] = {"zsre": zsre, "counterfact": counterfact, "mquake": mquake}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        _add(table, entry.name, entry.load())
    return table


def register(schema: str, reader: Reader) -> None:
    """Add a reader to this process; raises ValueError if the schema has another reader."""
    _add(edit_readers(), schema, reader)


def _add(table: dict[str, Reader], schema: str, reader: Reader) -> None:
    if table.setdefault(schema, reader) is not reader:
        raise ValueError(f"another reader redefines the edit schema {schema!r}: {reader!r}")


def zsre(record: Record, options: ReadOptions) -> Iterator[EditRecord]:
    """Yield the edit of a zsRE record; none if its new target is empty."""
    target = record.text("alt", empty=True)
    edit = _edit(record, record.text("src"), record.text("subject"), target)
    question = record.text("loc")
    if options.strip_nq:
        question = question.removeprefix(NQ_PREFIX)
    probe = Probe(question, record.text("loc_ans"))
    paraphrases = (record.text("rephrase"),)
    if target:
        answers = record.items("answers") if "answers" in record.data else []
        yield EditRecord(edit, paraphrases, (probe,), str(answers[0]) if answers else "")


def counterfact(record: Record, options: ReadOptions) -> Iterator[EditRecord]:
    """Yield the edit of a CounterFact record."""
    edit = _edit(record, record.text("prompt"), record.text("subject"), record.text("target_new"))
    probe = Probe(record.text("locality_prompt"), record.text("locality_ground_truth"))
    yield EditRecord(edit, (record.text("rephrase_prompt"),), (probe,), record.text("ground_truth"))


def mquake(record: Record, options: ReadOptions) -> Iterator[EditRecord]:
    """Yield an edit for every rewrite of a case.

    Locality prompts are the hops, before and after the edit, that no rewrite changes. The multi-hop questions are used
    only for a case with one rewrite: the answers follow from all rewrites, and each rewrite is a separate edit here.
    """
    rewrites = record.children("requested_rewrite")
    hops = [*record.children("single_hops"), *record.children("new_single_hops")]
    edits = [(_mquake_edit(record, rewrite), rewrite.text("question")) for rewrite in rewrites]
    rewritten = {text for edit, question in edits for text in (edit.prompt, question)}
    kept = (hop for hop in hops if not rewritten & {hop.text("cloze"), hop.text("question")})
    locality = tuple(dict.fromkeys(Probe(hop.text("cloze"), hop.text("answer")) for hop in kept))
    questions = [q for q in record.items("questions") if isinstance(q, str) and q.strip()]
    if not questions:
        raise record.error("field 'questions' has no question")
    answer, before = record.text("new_answer"), record.text("answer")
    multi_hop = tuple(Probe(_prompt(question.strip(), options.ask_as), answer, before) for question in questions)
    for (edit, question), rewrite in zip(edits, rewrites, strict=True):
        truth = rewrite.child("target_true").text("str")
        paraphrases = (_prompt(question, options.ask_as),)
        yield EditRecord(edit, paraphrases, locality, truth, multi_hop if len(edits) == 1 else ())


def _prompt(text: str, ask_as: str) -> str:
    """Return a question in the template `ask_as`; text without a question mark is continued as it is."""
    return ask_as.replace("{}", text) if text.endswith("?") else text


def _mquake_edit(record: Record, rewrite: Record) -> Edit:
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in template:
        raise record.error(f"field {rewrite.at + '.prompt'!r} has no {{}} for the subject")
    return Edit(template.replace("{}", subject), subject, rewrite.child("target_new").text("str"))


def _edit(record: Record, prompt: str, subject: str, target: str) -> Edit:
    if subject not in prompt:
        raise record.error(f"the subject {subject!r} is not in the prompt {prompt!r}")
    return Edit(prompt, subject, target)
