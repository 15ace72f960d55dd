"""Read MLP keys and hidden states at the subjects of edits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.edit.kernels.memory import ReadKeys, reading
from interventions.edit.kernels.prompts import TokenisedPrompt, tokenise
from interventions.padding import pad_right, padding_id
from interventions.structure import Anatomy, Block, first_output, module_device
from interventions.types import Edit

_BATCH = 32


class SubjectStates(NamedTuple):
    """Float32, a row per edit, at the subject's last token."""

    keys: Tensor
    """(edits, d_k): what an MLP's output is linear in, averaged over the contexts."""
    values: Tensor
    """(edits, hidden): output of a block, or of its MLP, in the bare prompt."""


@torch.no_grad()
def keys_and_values(
    model: nn.Module,
    tokenizer: Any,
    anatomy: Anatomy,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    layer: int,
    value_layer: int | None = None,
    *,
    chat_template: bool = False,
    inside: bool = False,
    averaged: bool = True,
) -> SubjectStates:
    """Return the keys of block `layer` and the outputs of block `value_layer` (None: `layer`), which is not below it.

    With `inside`, values are the outputs of that block's MLP. The first context must be empty. As published for MEMIT,
    keys are the mean of the bare prompt's key and the mean key of the other contexts. If not `averaged`, there is a key
    for each edit and context, in this order, times the square root of its share of that mean. Every text runs once, up
    to the last block needed.
    """
    key_block = anatomy.blocks[layer]
    value_block = anatomy.blocks[layer if value_layer is None else value_layer]
    bare = [tokenise(tokenizer, edit, chat_template=chat_template) for edit in edits]
    value_module = value_block.memory.module if inside else value_block.module
    keys, values = _read(model, tokenizer, bare, key_block, value_module)
    if len(contexts) > 1:
        pairs = [(edit, context) for edit in edits for context in contexts[1:]]
        others = [tokenise(tokenizer, edit, context, chat_template=chat_template) for edit, context in pairs]
        in_contexts = _read(model, tokenizer, others, key_block, None)[0].reshape(len(edits), len(contexts) - 1, -1)
        if averaged:
            keys = (keys + in_contexts.mean(dim=1)) / 2
        else:
            keys = torch.cat([keys[:, None], in_contexts], dim=1).flatten(0, 1)
            keys *= roots(len(edits), len(contexts), keys.device)
    return SubjectStates(keys, values)


def roots(edits: int, contexts: int, device: torch.device) -> Tensor:
    """Return the square root of each context's share of the mean of an edit's keys, (edits * contexts, 1)."""
    shares = torch.full((contexts,), 0.5 / max(1, contexts - 1), device=device)
    shares[0] = 0.5 if contexts > 1 else 1.0
    return shares.sqrt().repeat(edits)[:, None]


def _read(
    model: nn.Module, tokenizer: Any, rows: Sequence[TokenisedPrompt], key_block: Block, value_module: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of every text; without `value_module`, no values."""
    seen: dict[str, Tensor] = {}
    places = torch.empty(0)

    def see_key(read: ReadKeys) -> None:
        seen["key"] = read(places)
        if value_module is None:
            raise StopForward

    def see_value(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["value"] = first_output(output)
        raise StopForward

    device = module_device(model)
    keys, values = [], []
    with ExitStack() as stack:
        stack.enter_context(reading(key_block.memory, see_key))
        if value_module is not None:
            stack.enter_context(value_module.register_forward_hook(see_value))
        for start in range(0, len(rows), _BATCH):
            chunk = rows[start : start + _BATCH]
            ids, mask = pad_right([row.ids for row in chunk], padding_id(tokenizer), device)
            every = torch.arange(len(chunk), device=device)
            ends = torch.tensor([row.subject_end for row in chunk], device=device)
            places = every * ids.shape[1] + ends
            run_until_seen(model, {"input_ids": ids, "attention_mask": mask})
            keys.append(seen["key"])
            if value_module is not None:  # some MLPs flatten rows and tokens, some blocks have several hidden states
                values.append(seen["value"].reshape(*ids.shape, -1)[every, ends].float())
    return torch.cat(keys), torch.cat(values) if values else torch.empty(0)
