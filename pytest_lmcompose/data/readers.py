"""Read edits, facts and texts. Edits: with a table of readers by schema, which other packages can extend.

A reader takes one record of a source and yields its edits:

    def mine(record: Record, options: ReadOptions) -> Iterator[EditCase]: ...

A package adds a reader by an entry point of the group `lmcompose.edit_readers`, named after the schema; a notebook or a
`conftest.py` calls `register("mine", mine)`. Then `world.edits_schema=mine` reads such files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from evaluators.data import EditCase, Fact, Probe
from interventions.names import near_names
from interventions.types import Edit
from pytest_lmcompose.data.extensions import add, add_installed
from pytest_lmcompose.data.records import Record, WorldError
from pytest_lmcompose.data.sources import read_source
from pytest_lmcompose.data.templates import QA_TEMPLATE, qa_text

ENTRY_POINT_GROUP = "lmcompose.edit_readers"
_WHAT = "edit schema"
NQ_PREFIX = "nq question: "
AUTO = "auto"
"""The schema of a source whose first record shows which one it is."""


class ReadOptions(NamedTuple):
    """The settings of a world for its edits."""

    strip_nq: bool = True
    """Remove zsRE's "nq question: " before locality prompts."""
    ask_as: str = "{}"
    """Template for prompts that end with a question mark; {} is the question."""


Reader: TypeAlias = Callable[[Record, ReadOptions], Iterator[EditCase]]


def read_edits(
    source: Any, schema: str = AUTO, *, strip_nq: bool = True, ask_as: str = "{}", folder: Path = Path()
) -> list[EditCase]:
    """Read edits in a schema, such as `zsre`, `counterfact` or `mquake`.

    Raises WorldError for an unknown schema, a missing or empty field, and a subject that is not in its prompt. Record
    numbers in errors start at 1.
    """
    if (problem := unknown_schema(schema)) is not None:
        raise WorldError(f"{source}: the schema is {schema!r}, {problem}")
    records = read_source(source, folder)
    first = next(records)
    read, options = edit_readers()[_recognised(first) if schema == AUTO else schema], ReadOptions(strip_nq, ask_as)
    return [edit for record in itertools.chain([first], records) for edit in read(record, options)]


def read_texts(source: Any, folder: Path = Path(), qa_template: str = QA_TEMPLATE) -> tuple[str, ...]:
    """Read the field `text` of every record as it stands; blank texts are left out. Raises WorldError.

    Of a record without it, `question` and `answer` are the text, as `qa_template` says.
    """
    first: Record | None = None
    texts = []
    for record in read_source(source, folder):
        first = first or record
        if (text := _text(record, qa_template)).strip():
            texts.append(text)
    if not texts and first is not None:
        raise WorldError(f"{first.path}: every text is blank")
    return tuple(texts)


def _text(record: Record, qa_template: str) -> str:
    if "text" not in record.data and {"question", "answer"} <= record.data.keys():
        return qa_text(qa_template, record.text("question"), record.text("answer"))
    return record.raw_text("text")


def read_facts(source: Any, folder: Path = Path()) -> list[Fact]:
    """Read facts: subject, prompt, answer, relation and, where given, split. Raises WorldError."""
    return [
        Fact(
            record.text("prompt"),
            record.text("answer"),
            record.text("relation"),
            record.text("split", empty=True) if "split" in record.data else "",
            record.text("subject"),
        )
        for record in read_source(source, folder)
    ]


def unknown_schema(schema: str) -> str | None:
    """Return the problem with an unknown schema, with similar names; None if it is known."""
    known = [*edit_readers(), AUTO]
    if schema in known:
        return None
    return f"expected one of {', '.join(known)}.{near_names(schema, known)}".removesuffix(".")


def _recognised(record: Record) -> str:
    """Return the schema of a record by the fields that only its data set has."""
    data = record.data
    rewrite = data.get("requested_rewrite")
    if rewrite is not None:
        return "mquake" if isinstance(rewrite, list) else "counterfact"
    if "src" in data or "alt" in data:
        return "zsre"
    if "locality_prompt" in data:
        return "counterfact"
    if "prompt" in data and "target_new" in data:
        return "knowedit"
    raise record.error(
        f"not recognised as edits of zsRE, CounterFact, MQuAKE or KnowEdit: it has {', '.join(map(str, data))}; "
        f"set world.edits_schema to one of {', '.join(edit_readers())}"
    )


@cache
def edit_readers() -> dict[str, Reader]:
    """Return every reader by its schema, built-in ones first."""
    table: dict[str, Reader] = {"zsre": zsre, "counterfact": counterfact, "mquake": mquake, "knowedit": knowedit}
    return add_installed(table, ENTRY_POINT_GROUP, _WHAT)


def register(schema: str, reader: Reader) -> None:
    """Add a reader to this process; raises ValueError if the schema has another reader."""
    add(edit_readers(), schema, reader, _WHAT)


def zsre(record: Record, options: ReadOptions) -> Iterator[EditCase]:
    """Yield the edit of a zsRE record; none if its new target is empty."""
    target = record.text("alt", empty=True)
    edit = _edit(record, record.text("src"), record.text("subject"), target)
    question = record.text("loc")
    if options.strip_nq:
        question = question.removeprefix(NQ_PREFIX)
    probe = Probe(question, record.text("loc_ans"))
    paraphrases = record.texts("rephrase")
    hops: tuple[Probe, ...] = ()
    if record.data.get("portability"):  # EasyEdit's files with one question more
        hop = record.child("portability")
        hops = (Probe(hop.text("New Question"), hop.text("New Answer")),)
    if target:
        yield EditCase.of(edit, paraphrases, (probe,), _answer(record.data.get("answers")), hops)


def counterfact(record: Record, options: ReadOptions) -> Iterator[EditCase]:
    """Yield the edit of a CounterFact record: as published, with several prompts of each kind, or EasyEdit's."""
    if "requested_rewrite" in record.data:
        rewrite = record.child("requested_rewrite")
        truth = rewrite.child("target_true").text("str")
        neighbours = tuple(Probe(prompt, truth) for prompt in record.texts("neighborhood_prompts"))
        yield EditCase.of(_rewritten(record, rewrite), record.texts("paraphrase_prompts"), neighbours, truth)
        return
    edit = _edit(record, record.text("prompt"), record.text("subject"), record.text("target_new"))
    probe = Probe(record.text("locality_prompt"), record.text("locality_ground_truth"))
    hops: tuple[Probe, ...] = ()
    if record.data.get("portability_prompt"):
        hops = (Probe(record.text("portability_prompt"), record.text("portability_ground_truth")),)
    yield EditCase.of(edit, record.texts("rephrase_prompt"), (probe,), record.text("ground_truth"), hops)


def knowedit(record: Record, options: ReadOptions) -> Iterator[EditCase]:
    """Yield the edit of a KnowEdit record, with the prompts of each kind of portability and locality that it has.

    Of several answers, and of several names of one, the first counts; prompts without an answer are left out.
    """
    edit = _edit(record, record.text("prompt"), record.text("subject"), record.text("target_new"))
    paraphrases = next((record.texts(key) for key in ("rephrase", "rephrase_prompt") if record.data.get(key)), ())
    truth = _answer(record.data.get("ground_truth"))
    yield EditCase.of(edit, paraphrases, _by_kind(record, "locality"), truth, _by_kind(record, "portability"))


def _by_kind(record: Record, key: str) -> tuple[Probe, ...]:
    """Return the prompts of all kinds: {kind: [{prompt, ground_truth}]}."""
    if not record.data.get(key):
        return ()
    group = record.child(key)
    found = [
        Probe(probe.text("prompt"), answer, kind=kind)
        for kind, probes in group.data.items()
        if probes
        for probe in group.children(kind)
        if (answer := _answer(probe.data.get("ground_truth")))
    ]
    return tuple(dict.fromkeys(found))


def _answer(value: Any) -> str:
    """Return the first text of an answer: a text, a list of them, or a list of lists; empty where there is none."""
    while isinstance(value, (list, tuple)):
        value = next(iter(value), None)
    return "" if value is None or isinstance(value, Mapping) else str(value).strip()


def mquake(record: Record, options: ReadOptions) -> Iterator[EditCase]:
    """Yield an edit for every rewrite of a case.

    Locality prompts are the hops, before and after the edit, that no rewrite changes. The multi-hop questions are used
    only for a case with one rewrite: the answers follow from all rewrites, and each rewrite is a separate edit here.
    """
    rewrites = record.children("requested_rewrite")
    hops = [*record.children("single_hops"), *record.children("new_single_hops")]
    edits = [(_rewritten(record, rewrite), rewrite.text("question")) for rewrite in rewrites]
    rewritten = {text for edit, question in edits for text in (edit.prompt, question)}
    kept = (hop for hop in hops if not rewritten & {hop.text("cloze"), hop.text("question")})
    locality = tuple(dict.fromkeys(Probe(hop.text("cloze"), hop.text("answer")) for hop in kept))
    questions = [q for q in record.items("questions") if isinstance(q, str) and q.strip()]
    if not questions:
        raise record.error("field 'questions' has no question")
    answer, before = record.text("new_answer"), record.text("answer")
    multi_hop = tuple(Probe(_prompt(question.strip(), options.ask_as), answer, before) for question in questions)
    for (edit, question), rewrite in zip(edits, rewrites, strict=True):
        truth = _target(rewrite, "target_true")
        paraphrases = (_prompt(question, options.ask_as),)
        yield EditCase.of(edit, paraphrases, locality, truth, multi_hop if len(edits) == 1 else ())


def _prompt(text: str, ask_as: str) -> str:
    """Return a question in the template `ask_as`; text without a question mark is continued as it is."""
    return ask_as.replace("{}", text) if text.endswith("?") else text


def _rewritten(record: Record, rewrite: Record) -> Edit:
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in template:
        raise record.error(f"field {rewrite.at + '.prompt'!r} has no {{}} for the subject")
    return Edit(template.replace("{}", subject), subject, _target(rewrite, "target_new"))


def _target(rewrite: Record, key: str) -> str:
    """Return a target of a rewrite: `{key: {str: ...}}`, or `key_str` as MQuAKE-Remastered has it."""
    flat = f"{key}_str"
    return rewrite.text(flat) if flat in rewrite.data else rewrite.child(key).text("str")


def _edit(record: Record, prompt: str, subject: str, target: str) -> Edit:
    """Return an edit whose subject is spelt as in the prompt."""
    if subject in prompt:
        return Edit(prompt, subject, target)
    at = prompt.lower().find(subject.lower())
    if at < 0 or len(prompt.lower()) != len(prompt):
        raise record.error(f"the subject {subject!r} is not in the prompt {prompt!r}")
    return Edit(prompt, prompt[at : at + len(subject)], target)
