"""The prompts of two sets as token ids, and passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, accepted, run_until_seen
from interventions.structure import Anatomy, Block, first_output, module_device
from interventions.tokens import Chat, ChatError, ask, join
from interventions.types import InterventionError
from interventions.unlearn.kernels.texts import Rows, make_batches

SETS = ("harmful", "harmless")
Change = Callable[[Tensor], Tensor]


class Prompts:
    """The prompts of both sets, tokenised, and what a model makes of them at their last tokens."""

    def __init__(
        self,
        method: str,
        model: nn.Module,
        tokenizer: Any,
        sets: Mapping[str, Sequence[str]],
        chat: Chat | None,
        batch_size: int,
    ) -> None:
        """Tokenise the prompts; raises InterventionError for a set without prompts, and a prompt without tokens."""
        self.method, self._model, self._tokenizer, self._chat, self._size = method, model, tokenizer, chat, batch_size
        self.texts: dict[str, tuple[str, ...]] = {}
        self.rows: dict[str, Rows] = {}
        for name in SETS:
            texts = tuple(sets.get(name, ()))
            if not texts:
                raise InterventionError(f"{method} needs {name} prompts; none were given (resources.refusal)")
            self.texts[name] = texts
            self.rows[name] = self._tokenise(name, texts)

    def shortest(self) -> int:
        """Return the number of tokens of the shortest prompt."""
        return min(len(row) for rows in self.rows.values() for row in rows)

    def start_ids(self, starts: Sequence[str]) -> list[int]:
        """Return the ids of the tokens that answers start with."""
        prompt = self.texts["harmful"][0]
        pairs = join(self._tokenizer, [(prompt, start) for start in starts], chat=self._chat)
        return list(dict.fromkeys(pair.target[0] for pair in pairs if pair.target))

    def last_states(self, anatomy: Anatomy, rows: Rows, tokens: int) -> Tensor:
        """Return the outputs of all blocks at the last `tokens` tokens, (blocks, tokens, prompts, width) float64."""
        found = torch.empty(len(anatomy.blocks), tokens, len(rows), anatomy.width, dtype=torch.float64)
        for batch in make_batches(rows, self._size, self._tokenizer, module_device(self._model)):
            places = batch.mask.sum(dim=1, keepdim=True) - tokens + torch.arange(tokens, device=batch.mask.device)

            def see(block: Block, output: Tensor, places: Tensor = places, which: Tensor = batch.which) -> None:
                own = places.to(output.device)
                picked = output[torch.arange(len(own), device=own.device).unsqueeze(1), own]
                found[block.index, :, which.cpu()] = picked.double().cpu().transpose(0, 1)
                if block.index == len(anatomy.blocks) - 1:
                    raise StopForward

            with seeing_outputs(anatomy.blocks, see):
                run_until_seen(self._model, {"input_ids": batch.ids, "attention_mask": batch.mask})
        return found

    def next_logs(self, head: nn.Module, rows: Rows) -> Tensor:
        """Return the log-probabilities of the token after each prompt, (prompts, vocabulary) float64."""
        found: list[Tensor | None] = [None] * len(rows)
        for batch in make_batches(rows, self._size, self._tokenizer, module_device(self._model)):
            last = batch.mask.sum(dim=1) - 1
            with _head_on(head, last):
                arguments = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
                logits = self._model(**accepted(self._model, arguments)).logits[:, 0]
            logs = torch.log_softmax(logits.double(), dim=-1).cpu()
            for number, own in zip(batch.which.tolist(), logs, strict=True):
                found[number] = own
        return torch.stack([own for own in found if own is not None])

    def _tokenise(self, name: str, texts: Sequence[str]) -> Rows:
        try:
            rows = [text.ids for text in ask(self._tokenizer, texts, self._chat)]
        except ChatError as error:
            raise InterventionError(f"{self.method}.chat_template: {error}; set it to false") from None
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
            if not row:
                raise InterventionError(f"{self.method}: {name} prompt {number}, {text[:40]!r}, has no tokens")
            if limit is not None and 0 < limit < len(row):
                raise InterventionError(
                    f"{self.method}: {name} prompt {number}, {text[:40]!r}, has {len(row)} tokens, but the model "
                    f"{limit} positions: remove it"
                )
        return rows


@contextmanager
def seeing_outputs(blocks: Sequence[Block], see: Callable[[Block, Tensor], None]) -> Iterator[None]:
    """Call `see` with the output of every block, while the model runs."""

    def hook(block: Block) -> Callable[..., None]:
        return lambda module, arguments, output: see(block, first_output(output))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_hook(hook(block)).remove)
        yield


@contextmanager
def changed_outputs(modules: Sequence[nn.Module], change: Change) -> Iterator[None]:
    """Change the outputs of modules, the first one where they return several."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple | list):
            return (change(output[0]), *output[1:])
        return change(output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def changed_input(module: nn.Module, change: Change) -> Iterator[None]:
    """Change the hidden states that a block or a norm reads."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (change(arguments[0]), *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": change(keywords["hidden_states"])}

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def _head_on(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Let the head run on one token of each row only."""

    def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        own = places.to(hidden.device)
        return (hidden[torch.arange(len(own), device=own.device), own].unsqueeze(1), *arguments[1:])

    with head.register_forward_pre_hook(cut):
        yield
