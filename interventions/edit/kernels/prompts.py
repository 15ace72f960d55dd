"""Tokenise edits: find the subject's last token and the target's tokens, and sample contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from interventions.early_exit import accepted
from interventions.structure import module_device
from interventions.tokens import Chat, ChatError, border, continued, read, special_texts
from interventions.types import Edit, InterventionError

CONTEXT_OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""First words of the contexts that the model generates (Meng et al., 2023)."""
_TOP_K = 5


@dataclass(frozen=True)
class TokenisedPrompt:
    """The tokens of a text, the index of the subject's last token, and the number of target tokens at the end."""

    ids: tuple[int, ...]
    subject_end: int
    target_length: int = 0

    @property
    def target_places(self) -> range:
        """Positions of the target's tokens."""
        return range(len(self.ids) - self.target_length, len(self.ids))


def check_edits(edits: Sequence[Edit]) -> None:
    """Raise InterventionError, naming the edit, for invalid edits."""
    if not edits:
        raise InterventionError("no edits given: an editing method needs at least one")
    for number, edit in enumerate(edits):
        if not edit.subject.strip():
            raise InterventionError(f"edit {number} ({edit.prompt!r}): the subject is empty")
        if edit.subject not in edit.prompt:
            raise InterventionError(f"edit {number}: the subject {edit.subject!r} is not in its prompt {edit.prompt!r}")
        if not edit.target.strip():
            raise InterventionError(f"edit {number} ({edit.prompt!r}): the target is empty")


def tokenise(
    tokenizer: Any, edit: Edit, context: str = "", *, with_target: bool = False, chat_template: bool = False
) -> TokenisedPrompt:
    """Tokenise `context` and the edit's prompt, with its target if `with_target`.

    Prompt and target are joined as in `interventions.tokens.join`. With `chat_template`, the prompt is the user's
    message and the target starts the answer. The first occurrence of the subject counts. Raises InterventionError if
    the tokenizer has no character offsets or no chat template, or if prompt or target has no token of its own.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InterventionError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer")
    text, begin = _framed(tokenizer, context + edit.prompt, chat_template)
    begin += len(context) + edit.prompt.index(edit.subject)
    end = begin + len(edit.subject)
    target_begin = border(text)
    if with_target:
        gap = Chat().gap(tokenizer) if chat_template else None
        text = continued(text, edit.target, special_texts(tokenizer), gap)
    (row,) = read(tokenizer, [text], begin=not chat_template)
    assert row.spans is not None
    # A byte-level token may include the space before its word, so tokens only need to overlap the subject.
    within = [place for place, (start, stop) in enumerate(row.spans) if start < end and stop > begin and stop > start]
    if not within:
        raise InterventionError(f"no token of {text!r} covers the subject {edit.subject!r}")
    target_length = len(row.ids) - row.before(target_begin) if with_target else 0
    if with_target and not 0 < target_length < len(row.ids):
        what = f"the target {edit.target!r}" if target_length == 0 else "the prompt"
        raise InterventionError(f"{what} has no token of its own in {text!r}")
    return TokenisedPrompt(tuple(row.ids), within[-1], target_length)


def _framed(tokenizer: Any, prompt: str, chat_template: bool) -> tuple[str, int]:
    """Return the text with the chat template applied, and the prompt's offset in it."""
    if not chat_template:
        return prompt, 0
    try:
        text = Chat().ask(tokenizer, prompt)
    except ChatError as error:
        raise InterventionError(f"chat_template=true, but {error}; set chat_template=false") from None
    begin = text.rfind(prompt.strip())  # many templates strip the message
    if begin < 0:
        raise InterventionError(f"the tokenizer's chat template changes the prompt {prompt!r}; set chat_template=false")
    return text, begin - (len(prompt) - len(prompt.lstrip()))


@torch.no_grad()
def sample_contexts(
    model: nn.Module, tokenizer: Any, lengths: Sequence[int], per_length: int, generator: torch.Generator
) -> list[str]:
    """Generate `per_length` contexts of each length (in tokens) from the opening words, with top-5 sampling.

    Each context ends in ". " so that a prompt can follow.
    """
    device = module_device(model)
    contexts = []
    for length in lengths:
        for number in range(per_length):
            opening = CONTEXT_OPENINGS[number % len(CONTEXT_OPENINGS)]
            ids = torch.tensor([read(tokenizer, [opening])[0].ids], device=device)
            for _ in range(length):  # texts so short need no cache, which models have of many kinds
                output = model(**accepted(model, {"input_ids": ids, "use_cache": False}))
                values, tokens = output.logits[0, -1].float().topk(_TOP_K)
                choice = torch.multinomial(values.softmax(dim=0).cpu(), 1, generator=generator)
                ids = torch.cat([ids, tokens[choice.to(device)].reshape(1, 1)], dim=1)
            contexts.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip() + ". ")
    return contexts
