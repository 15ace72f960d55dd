"""Read examples to learn and preferences, in the forms that TRL reads too. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from evaluators.data import TuningData
from interventions.types import Example, Preference, Turn
from pytest_lmcompose.data.records import Record, WorldError
from pytest_lmcompose.data.sources import read_source

ASSISTANT, USER = "assistant", "user"
_ROLES = ("system", "developer", USER, ASSISTANT)
T = TypeVar("T")


def read_examples(source: Any, folder: Path = Path()) -> tuple[Example, ...]:
    """Read `prompt` or `question` with `answer` or `completion`, as texts or messages; or `messages` with all turns.

    Raises WorldError for a field that is missing or empty, and for a conversation that does not end in an answer.
    """
    return tuple(_example(record) for record in read_source(source, folder))


def read_preferences(source: Any, folder: Path = Path()) -> tuple[Preference, ...]:
    """Read `prompt`, `chosen` and `rejected`, as texts or messages; without a prompt it is what both begin with.

    Raises WorldError for a field that is missing or empty, and for two equal answers.
    """
    return tuple(_preference(record) for record in read_source(source, folder))


def check_unseen(
    examples: Mapping[str, Sequence[Example]], preferences: Sequence[Preference], heldout: TuningData
) -> None:
    """Raise WorldError if a held-out row is also one to learn, in whichever set."""
    learnt: set[Example | Preference] = {row for rows in examples.values() for row in rows} | set(preferences)
    sets: dict[str, Sequence[Example | Preference]] = {f"tuning_heldout.{k}": v for k, v in heldout.examples.items()}
    for key, rows in (sets | {"preferences_heldout": heldout.preferences}).items():
        if shared := [row for row in rows if row in learnt]:
            raise WorldError(
                f"world.{key}: {len(shared)} of {len(rows)} rows are rows to learn too, for instance "
                f"{shared[0].prompt[:60]!r}; measure what was learnt on other rows"
            )


def _example(record: Record) -> Example:
    if _has(record, "messages"):
        *before, answer = _turns(record, "messages", last=ASSISTANT)
        return Example(*_asked(record, "messages", before, answer.content), chat=True, whole=True)
    asked = next((key for key in ("prompt", "question") if _has(record, key)), None)
    answered = next((key for key in ("answer", "completion") if _has(record, key)), None)
    if asked is None or answered is None:
        raise record.error(
            "expected prompt and answer, prompt and completion, question and answer, or messages; "
            f"it has {', '.join(map(str, record.data))}"
        )
    if not isinstance(record.data[asked], list):
        return Example(*_verbatim(record, asked, answered))
    turns = [*_turns(record, asked), *_turns(record, answered, last=ASSISTANT)]
    return Example(*_asked(record, answered, turns[:-1], turns[-1].content), chat=True)


def _preference(record: Record) -> Preference:
    if isinstance(record.data.get("chosen"), list):
        found = _preferred_turns(record)
    elif _has(record, "prompt"):
        (prompt, chosen), (_, rejected) = (_verbatim(record, "prompt", key) for key in ("chosen", "rejected"))
        found = Preference(prompt, chosen, rejected)
    else:
        found = _preferred_texts(record)
    if found.chosen == found.rejected:
        raise record.error(f"chosen and rejected are the same answer, {found.chosen[:60]!r}")
    return found


def _preferred_turns(record: Record) -> Preference:
    """Return a preference given as messages, whose prompt may stand before both answers or in a field of its own."""
    chosen, rejected = (_turns(record, key, last=ASSISTANT) for key in ("chosen", "rejected"))
    shared = _shared(chosen[:-1], rejected[:-1])
    before = chosen[:shared]
    if isinstance(record.data.get("prompt"), list):
        before = [*_turns(record, "prompt"), *before]
    elif not before and _has(record, "prompt"):
        before = [Turn(USER, record.text("prompt"))]
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if (own := len(turns) - shared) != 1:
            raise record.error(f"field {key!r} has {own} turns of its own, expected one: the answer")
    prompt, answer, earlier = _asked(record, "chosen", before, chosen[-1].content)
    return Preference(prompt, answer, rejected[-1].content, earlier, chat=True)


def _preferred_texts(record: Record) -> Preference:
    """Return a preference whose texts begin with the same prompt, which ends at the last shared white space."""
    chosen, rejected = record.text("chosen"), record.text("rejected")
    shared = chosen[: _shared(chosen, rejected)]
    end = max((i for i, c in enumerate(shared) if c.isspace()), default=0)
    if not shared[:end].strip():
        raise record.error("field 'prompt' is missing, and chosen and rejected do not begin with the same words")
    if not (chosen[end:].strip() and rejected[end:].strip()):
        raise record.error("one of chosen and rejected is the beginning of the other, so there is no answer to compare")
    return Preference(shared[:end], chosen[end:].strip(), rejected[end:].strip())


def _verbatim(record: Record, asked: str, answered: str) -> tuple[str, str]:
    """Return a prompt, with the white space at its end or before the answer, and the answer without any."""
    record.text(asked)  # not empty
    answer, written = record.text(answered), record.raw_text(answered)
    return record.raw_text(asked) + written[: len(written) - len(written.lstrip())], answer


def _shared(one: Sequence[T], other: Sequence[T]) -> int:
    """Return how many items two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _asked(record: Record, key: str, before: Sequence[Turn], answer: str) -> tuple[str, str, tuple[Turn, ...]]:
    """Return the last prompt, the answer to it, and the turns before them."""
    if not before or before[-1].role != USER:
        raise record.error(f"field {key!r}: expected a turn of the user before the answer")
    return before[-1].content, answer, tuple(before[:-1])


def _turns(record: Record, key: str, last: str = "") -> list[Turn]:
    """Return the turns of a field; the last one is by `last`, if that is given, and a text is a turn by it."""
    if last and isinstance(record.data.get(key), str):
        return [Turn(last, record.text(key))]
    turns = [_turn(turn) for turn in record.children(key)]
    if not turns:
        raise record.error(f"field {key!r} has no turns")
    if last and turns[-1].role != last:
        raise record.error(f"field {key!r} ends in a turn of the {turns[-1].role}; expected one of the {last}")
    return turns


def _turn(turn: Record) -> Turn:
    role = turn.text("role")
    if role not in _ROLES:
        raise turn.error(f"field {turn.at + '.role'!r} is {role!r}; expected one of {', '.join(_ROLES)}")
    content = turn.data.get("content")
    if isinstance(content, list):  # parts, as models that see pictures take them
        parts = [part.text("text") for part in turn.children("content")]
        return Turn(role, "\n".join(parts))
    return Turn(role, turn.text("content"))


def _has(record: Record, key: str) -> bool:
    return record.data.get(key) is not None
