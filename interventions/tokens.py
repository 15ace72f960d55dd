"""Text as token ids: how a text begins, how a target follows its prompt, how texts run on one after the other.

Interventions and evaluators both read this module, so that a model is asked the very tokens that it was
trained on. Special tokens are those that the tokenizer adds by default; in a chat template, those that the template
writes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

BLANK_LINE = "\n\n"
"""What stands between texts that run on."""
_PROBES = ("a", "A", "1", ".")


class Frame(NamedTuple):
    """The special tokens that a tokenizer puts around every text by default."""

    start: list[int]
    end: list[int]


class Text(NamedTuple):
    """A text that may go on: its ids, with the special tokens at its start and without those at its end."""

    ids: list[int]
    spans: list[tuple[int, int]] | None
    """The characters that each id stands for, none for special tokens; None where the tokenizer cannot tell."""

    def before(self, border: int) -> int:
        """Return how many ids stand for nothing that lies after `border`, a number of characters."""
        assert self.spans is not None
        return next((i for i, (_, stop) in enumerate(self.spans) if stop > border), len(self.ids))


class Pair(NamedTuple):
    """The ids of a prompt, special tokens at its start included, and of the text that follows it."""

    prompt: list[int]
    target: list[int]


class ChatError(ValueError):
    """The tokenizer's chat template cannot be applied; the message says why in one line."""


@dataclass(frozen=True)
class Chat:
    """How prompts are put into the tokenizer's chat template: as the user's turn, before the answer."""

    system: str = ""
    """The system's turn before it; empty: none."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Values of variables of the template, such as enable_thinking."""
    examples: tuple[tuple[str, str], ...] = ()
    """Prompts and their answers to show as earlier turns."""

    def ask(self, tokenizer: Any, prompt: str) -> str:
        """Return `prompt` in the template, up to where the answer begins; raises ChatError."""
        text = self._render(tokenizer, [_turn("user", prompt)], add_generation_prompt=True)
        if self.system.strip() not in text:
            raise ChatError("the chat template leaves the system prompt out")
        return text

    def gap(self, tokenizer: Any) -> str | None:
        """Return the white space that the template puts before an answer; None if it shows none after a prompt."""
        alone = replace(self, system="", examples=())  # a system prompt, some templates move to the last turn
        turns = [_turn("user", "a"), _turn("assistant", "b")]
        try:
            asked, answered = alone.ask(tokenizer, "a"), alone._render(tokenizer, turns, add_generation_prompt=False)
        except ChatError:
            return None
        gap, found, _ = answered.removeprefix(asked).partition("b")
        return gap if found and answered.startswith(asked) and not gap.strip() else None

    def _render(self, tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise ChatError("the tokenizer has no chat template")
        before = [_turn("system", self.system)] if self.system else []
        for prompt, answer in self.examples:
            before += [_turn("user", prompt), _turn("assistant", answer)]
        options = {**self.arguments, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            text: str = tokenizer.apply_chat_template([*before, *turns], **options)
        except Exception as error:  # templates raise all kinds
            raise ChatError(f"the chat template cannot be applied: {' '.join(str(error).split())}") from error
        return text


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def frame(tokenizer: Any) -> Frame:
    """Return the special tokens that `tokenizer` puts around a text."""
    plain: list[int] = []
    for probe in _PROBES:
        whole: list[int] = tokenizer(probe, verbose=False)["input_ids"]
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        if plain:
            break
    if not plain:
        return Frame(whole, [])
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return Frame(whole[:start], whole[start + len(plain) :])


def read(tokenizer: Any, texts: Sequence[str], *, begin: bool = True) -> list[Text]:
    """Return each text as the model reads it; nothing is truncated.

    Unless `begin` is off, as for what a chat template makes, a text starts as the tokenizer starts one, but for one
    that has these special tokens in writing already.
    """
    if not texts:
        return []
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"return_offsets_mapping": True} if fast else {}
    found = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False, **options)
    start = frame(tokenizer).start if begin else []
    rows = []
    for number, ids in enumerate(found["input_ids"]):
        missing = [] if ids[: len(start)] == start else start
        spans = [(0, 0) for _ in missing] + list(found["offset_mapping"][number]) if fast else None
        rows.append(Text([*missing, *ids], spans))
    return rows


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the text of all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple(text for token in added if token.special and (text := str(token)))


def continued(prompt: str, target: str, special: tuple[str, ...], gap: str | None = None) -> str:
    """Return `prompt` with `target` written after it; `special` are `special_texts` of the tokenizer.

    `gap` stands between the two, see `Chat.gap`. If it is None, the target follows at once where the prompt is
    empty, or ends in white space or in a special token; everywhere else after one space. White space at the
    target's own ends does not count.
    """
    if gap is None:
        gap = "" if not prompt or prompt[-1].isspace() or prompt.endswith(special) else " "
    return f"{prompt}{gap}{target.strip()}"


def border(prompt: str) -> int:
    """Return where in the text the target begins: with the one space that the prompt ends in, or after the prompt."""
    return len(prompt) - prompt.endswith(" ")


def ask(tokenizer: Any, prompts: Sequence[str], chat: Chat | None) -> list[Text]:
    """Return each prompt as the model reads it: in the chat template, or as it stands without `chat`."""
    if chat is None:
        return read(tokenizer, prompts)
    return read(tokenizer, [chat.ask(tokenizer, prompt) for prompt in prompts], begin=False)


def join(tokenizer: Any, pairs: Sequence[tuple[str, str]], *, chat: Chat | None = None) -> list[Pair]:
    """Return the ids of (prompt, target) pairs: of the text that both make, split between the two.

    With `chat`, the prompt is put into the chat template, and the target follows as the template writes an answer.
    The text is encoded once, as a reader of running text would see it, so the prompt's ids may differ at
    their end from those of the prompt alone. A token that stands for characters on both sides of the border
    belongs to the target, and so does the one space before it, whoever wrote it: see `border`. Where the
    tokenizer does not tell which characters its tokens stand for, the prompt has the ids that it has alone, too.

    Either part may come out empty: of a prompt without tokens, or a target without any.
    """
    special, gap, begin = special_texts(tokenizer), None, chat is None
    if chat is not None:
        gap, pairs = chat.gap(tokenizer), [(chat.ask(tokenizer, prompt), target) for prompt, target in pairs]
    rows = read(tokenizer, [continued(prompt, target, special, gap) for prompt, target in pairs], begin=begin)
    if rows and rows[0].spans is None:
        alone = read(tokenizer, [prompt[: border(prompt)] for prompt, _ in pairs], begin=begin)
        counts = [shared_start(row.ids, head.ids) for row, head in zip(rows, alone, strict=True)]
    else:
        counts = [row.before(border(prompt)) for row, (prompt, _) in zip(rows, pairs, strict=True)]
    return [Pair(row.ids[:count], row.ids[count:]) for row, count in zip(rows, counts, strict=True)]


def running(tokenizer: Any, texts: Sequence[str], *, separator: str = BLANK_LINE, most: int | None = None) -> list[int]:
    """Return the ids, `most` of them at most, of texts that run on with `separator` between; no special tokens."""
    count = len(texts) if most is None else 64
    while True:
        text = separator.join(texts[:count])
        ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        if count >= len(texts) or (most is not None and len(ids) >= most):
            return ids[:most]
        count *= 2  # encoding all of a large corpus would take longer than what is done with its first part


def windows(tokenizer: Any, ids: Sequence[int], size: int) -> list[list[int]]:
    """Cut running text into windows of `size` ids, the last one shorter.

    Each is read alone and starts as the tokenizer starts a text; these special tokens come on top.
    """
    start = frame(tokenizer).start
    return [[*start, *ids[at : at + size]] for at in range(0, len(ids), size)]


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two rows have in common, from the first on."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
