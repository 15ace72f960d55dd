"""Read prompts with answers, and preferences, in the forms that TRL reads. Imports no torch.

Prompts and answers are plain text, or turns of a conversation: `{"role": "user", "content": "..."}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from evaluators.measurement import shorten
from interventions.types import Example, Preference
from pytest_lmcompose.data.records import Record, WorldError
from pytest_lmcompose.data.sources import read_source

T = TypeVar("T", Example, Preference)
Turn: TypeAlias = tuple[str, str]
"""A role and what it says."""
SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
_PROMPTS = ("prompt", "question")
_ANSWERS = ("answer", "completion")


def read_examples(source: Any, folder: Path = Path()) -> tuple[Example, ...]:
    """Read examples to tune on: `messages`, or `prompt` (or `question`) and `answer` (or `completion`).

    Turns after the last one of the assistant are left out. Raises WorldError for a field that is missing or empty,
    and for turns that are not a prompt and an answer, one after the other.
    """
    return tuple(_example(record) for record in read_source(source, folder))


def read_preferences(source: Any, folder: Path = Path()) -> tuple[Preference, ...]:
    """Read preferences: `chosen` and `rejected`, both with `prompt` or both starting with the same turns.

    Raises WorldError as `read_examples` does, and for answers that do not differ.
    """
    return tuple(_preference(record) for record in read_source(source, folder))


def check_apart(training: Sequence[T], heldout: Sequence[T], key: str) -> None:
    """Raise WorldError if a held-out row, of the world's `key`, is a training row too."""
    known = set(training)
    if shared := [row for row in heldout if row in known]:
        raise WorldError(
            f"world.{key}: {len(shared)} of {len(heldout)} rows are training rows too, for instance "
            f"{shorten(shared[0].prompt)!r}; a method must not be tested on its own training data"
        )


def _example(record: Record) -> Example:
    if "messages" in record.data:
        turns = _turns(record, "messages")
        last = max((i for i, (role, _) in enumerate(turns) if role == ASSISTANT), default=-1)
        if last < 0:
            raise record.error("field 'messages' has no turn of the assistant")
        return Example(**_asked(record, turns[:last], "messages"), answer=turns[last][1])
    prompt, answer = _first(record, _PROMPTS), _first(record, _ANSWERS)
    if isinstance(record.data.get(prompt), list):
        return Example(**_asked(record, _turns(record, prompt), prompt), answer=_answer(record, answer))
    return Example(record.text(prompt), record.text(answer))


def _preference(record: Record) -> Preference:
    sides = ("chosen", "rejected")
    if isinstance(record.data.get("prompt"), list):
        before = _asked(record, _turns(record, "prompt"), "prompt")
        chosen, rejected = (_answer(record, side) for side in sides)
    elif "prompt" in record.data:
        before = {"prompt": record.text("prompt")}
        chosen, rejected = (record.text(side) for side in sides)
    else:
        both = [_turns(record, side) for side in sides]
        if any(not turns or turns[-1][0] != ASSISTANT for turns in both):
            raise record.error("without the field 'prompt', expected 'chosen' and 'rejected' to end with the assistant")
        if both[0][:-1] != both[1][:-1]:
            raise record.error(
                "without the field 'prompt', expected 'chosen' and 'rejected' to differ in the last turn"
            )
        before = _asked(record, both[0][:-1], "chosen")
        chosen, rejected = (turns[-1][1] for turns in both)
    if chosen == rejected:
        raise record.error(f"'chosen' and 'rejected' are the same, {shorten(chosen)!r}")
    return Preference(**before, chosen=chosen, rejected=rejected)


def _first(record: Record, names: Sequence[str]) -> str:
    """Return the name that the record has; the first one, for an error, if it has none."""
    return next((name for name in names if name in record.data), names[0])


def _answer(record: Record, key: str) -> str:
    """Return an answer that follows turns: text, or the one turn of the assistant."""
    if not isinstance(record.data.get(key), list):
        return record.text(key)
    turns = _turns(record, key)
    if [role for role, _ in turns] != [ASSISTANT]:
        raise record.error(f"field {key!r}: expected one turn of the assistant")
    return turns[0][1]


def _turns(record: Record, key: str) -> list[Turn]:
    turns = [(turn.text("role"), turn.text("content")) for turn in record.children(key)]
    for role, _ in turns:
        if role not in ROLES:
            raise record.error(f"field {key!r}: the role {role!r} is none of {', '.join(ROLES)}")
    return turns


def _asked(record: Record, turns: list[Turn], key: str) -> dict[str, Any]:
    """Return the fields of a conversation whose next turn is the answer."""
    system = turns[0][1] if turns and turns[0][0] == SYSTEM else ""
    said = turns[1:] if system else turns
    if len(said) % 2 == 0 or any(role != (USER, ASSISTANT)[i % 2] for i, (role, _) in enumerate(said)):
        raise record.error(
            f"field {key!r}: before the answer, expected turns of user and assistant one after the other, the last of "
            f"the user; found {', '.join(role for role, _ in turns) or 'none'}"
        )
    pairs = [(said[i][1], said[i + 1][1]) for i in range(0, len(said) - 1, 2)]
    return {"prompt": said[-1][1], "chat": True, "system": system, "earlier": tuple(pairs)}
