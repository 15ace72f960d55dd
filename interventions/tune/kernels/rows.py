"""Examples and preferences as rows of TRL: plain text, or conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interventions.names import near_names
from interventions.tokens import border, continued, special_texts
from interventions.types import Example, InterventionError, Preference, Turns

if TYPE_CHECKING:
    from interventions.tune.bases import Tuned

Row = dict[str, Any]


class ExampleRows(NamedTuple):
    """Rows of `SFTTrainer`."""

    rows: list[Row]
    every_turn: bool
    """Whether each turn of the assistant is an answer to learn, not only the last one."""


def chosen_sets(
    method: str, wanted: Sequence[str] | None, sets: Mapping[str, Sequence[Example]]
) -> dict[str, Sequence[Example]]:
    """Return the sets to train on; raises InterventionError for one that is not there, and for none."""
    if not sets:
        raise InterventionError(f"{method}: no examples to tune on; set world.tuning")
    for name in wanted or ():
        if name not in sets:
            near = near_names(name, list(sets))
            raise InterventionError(f"{method}.sets: world.tuning has no set {name!r}.{near} Known: {', '.join(sets)}")
    return {name: sets[name] for name in (sets if wanted is None else wanted)}


def example_rows(settings: Tuned, tokenizer: Any, sets: Mapping[str, Sequence[Example]]) -> ExampleRows:
    """Return every example of the sets; raises InterventionError for conversations without a chat template."""
    examples = [example for one in sets.values() for example in one]
    if not _in_chat(settings, tokenizer, examples):
        rows = []
        for example in examples:
            prompt, answer = _apart(tokenizer, example.prompt, example.answer)
            rows.append({"prompt": prompt, "completion": answer})
        return ExampleRows(rows, False)
    if any(example.earlier for example in examples) and _marks_turns(tokenizer):
        return ExampleRows([{"messages": [*_asked(e), _turn("assistant", e.answer)]} for e in examples], True)
    return ExampleRows([{"prompt": _asked(e), "completion": [_turn("assistant", e.answer)]} for e in examples], False)


def preference_rows(settings: Tuned, tokenizer: Any, preferences: Sequence[Preference]) -> list[Row]:
    """Return every preference; raises InterventionError for none, and for conversations without a chat template."""
    if not preferences:
        raise InterventionError(f"{settings.name}: no preferences to tune on; set world.preferences")
    if _in_chat(settings, tokenizer, preferences):
        return [
            {
                "prompt": _asked(one),
                "chosen": [_turn("assistant", one.chosen)],
                "rejected": [_turn("assistant", one.rejected)],
            }
            for one in preferences
        ]
    rows = []
    for one in preferences:
        prompt, chosen = _apart(tokenizer, one.prompt, one.chosen)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": _apart(tokenizer, one.prompt, one.rejected)[1]})
    return rows


def _in_chat(settings: Tuned, tokenizer: Any, given: Sequence[Turns]) -> bool:
    """Return whether the chat template writes all prompts, instead of none."""
    chats = {one.chat for one in given}
    if chats == {True, False} and not settings.chat_template:
        raise InterventionError(
            f"{settings.name}: some prompts are plain, and some are conversations; set "
            f"{settings.name}.chat_template=true"
        )
    if True not in chats and not settings.chat_template:
        if tokenizer.eos_token is None:
            raise InterventionError(f"{settings.name}: the tokenizer has no token that ends an answer, eos_token")
        return False
    if not getattr(tokenizer, "chat_template", None):
        what = "the data have conversations" if True in chats else f"{settings.name}.chat_template=true"
        raise InterventionError(f"{settings.name}: {what}, but the tokenizer has no chat template")
    return True


def _marks_turns(tokenizer: Any) -> bool:
    """Return whether the chat template, or TRL's version of it, marks what the assistant says."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:  # a template that TRL does not know
        return False


def _apart(tokenizer: Any, prompt: str, answer: str) -> tuple[str, str]:
    """Return a prompt and its answer as two texts; the space between them belongs to the answer."""
    text = continued(prompt, answer, special_texts(tokenizer))
    return text[: border(prompt)], text[border(prompt) :]


def _asked(given: Any) -> list[Row]:
    turns = [_turn("system", given.system)] if given.system else []
    for prompt, answer in given.earlier:
        turns += [_turn("user", prompt), _turn("assistant", answer)]
    return [*turns, _turn("user", given.prompt)]


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}
